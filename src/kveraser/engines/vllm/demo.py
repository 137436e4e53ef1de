"""`python -m kveraser.engines.vllm.demo`: start a server, erase over HTTP, print the answers before and after.

Knows: the demo's stories, sessions. Does not know how the server does it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kveraser.demo.stories import Story, stories
from kveraser.engines.vllm.client import VLLMSession
from kveraser.engines.vllm.server.launch import running_server, server_arguments, shipped_folder
from kveraser.errors import KVEraserError
from kveraser.model.backbone import DEFAULT_BACKBONE
from kveraser.tasks import ask

_TOKENS = 12
_SETTINGS = ("--max-model-len", "2048", "--max-num-seqs", "4", "--block-size", "32", "--enforce-eager")


def tell(address: str, story: Story) -> tuple[str, str, float]:
    """One story: the answer with the span in the context, the answer after its erase, and the seconds the erase took."""
    session = VLLMSession(address)
    session.append(story.prefix)
    span = session.append(story.span)
    session.append(story.suffix)
    before = session.generate(ask(story.question), max_new_tokens=_TOKENS)
    started = time.perf_counter()
    session.erase(span)
    seconds = time.perf_counter() - started
    after = session.generate(ask(story.question), max_new_tokens=_TOKENS)
    session.close()
    return before, after, seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 when an answer still says what was erased."""
    parser = argparse.ArgumentParser(prog="python -m kveraser.engines.vllm.demo", description=__doc__)
    parser.add_argument(
        "--url", help="a server that runs already (see kveraser.engines.vllm.server.launch); default: start one"
    )
    known, rest = parser.parse_known_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    try:
        if known.url:
            return _tell_all(console, known.url)
        with tempfile.TemporaryDirectory() as folder:
            said = server_arguments(
                DEFAULT_BACKBONE, shipped_folder(DEFAULT_BACKBONE), Path(folder) / "store", extra=(*_SETTINGS, *rest)
            )
            console.print("starting vLLM (a minute on a CPU) ...")
            log = Path(tempfile.gettempdir()) / "kveraser-demo-vllm.log"
            with running_server(
                said, log=log, VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
            ) as address:
                return _tell_all(console, address)
    except KVEraserError as error:
        console.print(f"error ({type(error).__name__}): {error}", markup=False)
        return 2


def _tell_all(console: Console, address: str) -> int:
    table = Table("story", "erased", "asked", "answer before", "answer after", "erase", box=None, padding=(0, 1))
    leaks = 0
    for story in stories():
        before, after, seconds = tell(address, story)
        leaks += story.erased.lower() in after.lower()
        table.add_row(story.name, story.erased, story.question, _line(before), _line(after), f"{seconds:.1f} s")
    console.print(table)
    console.print(f"Answers with the erased value, of {len(stories())}: {leaks}")
    return int(leaks > 0)


def _line(text: str) -> str:
    return text.strip().split("\n", 1)[0]


if __name__ == "__main__":
    sys.exit(main())
