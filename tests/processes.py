"""Processes of their own, to be killed or to be several: forked from one that has imported already what takes seconds to import."""

from __future__ import annotations

import multiprocessing
import os
import sys
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

TESTS = Path(__file__).parent


@lru_cache(maxsize=1)
def _forking():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "kveraser.cli", "kveraser.serving.app", "uvicorn"])
    return context


def pipe():
    """Two ends: what one process sends and another one receives."""
    return _forking().Pipe(duplex=False)


def start(work, *arguments, log, **environment):
    """A process that does `work(*arguments)`, a function of a module, with more environment; what it prints goes to the file `log`."""
    process = _forking().Process(target=_begin, args=({**os.environ, **environment}, log, work, arguments), daemon=True)
    paths = os.pathsep.join(map(str, filter(None, [TESTS, os.environ.get("PYTHONPATH")])))
    with patch.dict(os.environ, {"PYTHONPATH": paths}):  # for the first one, with which the imports are done
        process.start()
    return process


def _begin(environment, log, work, arguments):
    os.environ.clear()
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1, closefd=False) for stream in (1, 2))
    work(*arguments)
