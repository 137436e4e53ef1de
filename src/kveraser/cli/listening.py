"""What the commands share that listen for requests: who is let in, and serving.

Knows: addresses, keys, sizes, uvicorn. Does not know what is served.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer

from kveraser.errors import OptionError
from kveraser.readers import LEAST_READERS
from kveraser.serving.exposure import check_exposure, check_keys

_NOT_STARTED = 3
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def parse_bytes(text: str) -> int:
    """A size such as `512M` or `4G`, in bytes.

    Raises:
        OptionError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if not found or not float(found[1]):
        raise OptionError(f"{text!r} is no size; write 512M or 4G")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_readers(text: str) -> int | None:
    """A number of readers; None for `length`.

    Raises:
        OptionError: it is neither.
    """
    if text.strip().lower() == "length":
        return None
    if not text.strip().isdecimal():
        raise OptionError(f"{text!r} is no number of readers; write {LEAST_READERS}, or length")
    return int(text)


def api_keys(given: Sequence[str], environment: str) -> list[str]:
    """The keys that are let in: of `--api-key`, and of `KVERASER_API_KEYS`, which may not be set.

    Raises:
        OptionError: an empty key, or one that no client could send.
    """
    keys = [*given, *(map(str.strip, environment.split(",")) if environment.strip() else ())]
    check_keys(keys)
    return keys


def checked_keys(host: str, policy: str, given: Sequence[str] | None) -> list[str]:
    """The keys that are let in, once it is known that what listens on an address may do so.

    Raises:
        OptionError: no such policy; a key that cannot be; others can reach the address, and there is no key.
    """
    if policy not in ("exact", "kveraser", "auto"):
        raise OptionError(f"policy={policy!r} must be exact, kveraser or auto")
    keys = api_keys(given or (), os.environ.get("KVERASER_API_KEYS", ""))
    check_exposure(host, bool(keys), "set KVERASER_API_KEYS")
    return keys


def local_names(host: str, keys: Sequence[str]) -> tuple[str, ...]:
    """The names by which browsers may call a server on an address: without keys this machine's, with keys (none named) all."""
    return () if keys else ("localhost", "127.0.0.1", "[::1]", host)


def listen(app: Any, host: str, port: int, **stopping: Any) -> None:
    """Serve an application until it is stopped, without a log of requests; `stopping` as of `Server`."""
    from kveraser.serving.server import Server

    server = Server(app, host=host.strip("[]"), port=port, log_level="warning", access_log=False, **stopping)
    with suppress(KeyboardInterrupt):  # it has stopped as it should, and passes the signal on
        server.run()
    if not server.started:
        raise typer.Exit(_NOT_STARTED)
