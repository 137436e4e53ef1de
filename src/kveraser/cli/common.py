"""What every command shares: loading with a word about it, errors and exit codes, JSON.

Knows: Rich, typer, our errors. Does not know any command.

Exit codes: 0 done, 1 the answer is no (a model that is not supported, say), 2 bad input or what the disk refuses, 130 interrupted.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import KVEraserError, OptionError, UnsupportedCacheError
from kveraser.model.backbone import DEFAULT_BACKBONE, load_backbone

# A pipe or a file has no width; tables need some.
stdout = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 140)
stderr = Console(stderr=True)


@contextmanager
def reported(as_json: bool = False) -> Iterator[None]:
    """Turn our errors, and what the operating system refuses, into a message and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except BrokenPipeError:  # whoever read the output has seen enough
        raise
    except (KVEraserError, OSError) as error:
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        else:
            stderr.print(f"[bold red]error[/] ({type(error).__name__}): ", end="")
            stderr.print(str(error), markup=False, highlight=False)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        stderr.print("\ninterrupted; nothing was left half-written")
        raise typer.Exit(130) from None


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Import what only an extra of the package brings.

    Raises:
        OptionError: it is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise OptionError(f"{error.name} is missing; install it with: pip install 'kveraser[{extra}]'") from error


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def load(
    model: str, device: str | None, dtype: str | None, quiet: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a backbone, saying so."""
    note = " (the first time its weights are converted, up to a minute)" if model == DEFAULT_BACKBONE else ""
    with stderr.status(f"loading {model}{note} ..."):
        loaded = load_backbone(model, device=device, dtype=dtype)
    if not quiet:
        body = loaded[0]
        stderr.print(f"[dim]{model} on {body.device}, {str(body.dtype).removeprefix('torch.')}[/]")
    return loaded


def find_eraser(path: str | None, model: PreTrainedModel) -> KVEraser | None:
    """The eraser in a folder or on the hub; without a path the model's own, or None for one that cannot be edited."""
    if path:
        return KVEraser.from_pretrained(path, model)
    try:
        return default_eraser(model)
    except UnsupportedCacheError:
        return None


def progress_bar() -> Progress:
    """A bar with the time left; it goes to standard error and disappears when done."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
    )
