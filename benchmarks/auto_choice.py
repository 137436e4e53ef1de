"""Whether `auto` chooses the faster of its two methods, over a grid of spans and suffixes.

    python benchmarks/auto_choice.py [--json] [--output FOLDER]

The regret is the time of what `auto` would use over the time of the faster of full recomputation and kveraser.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import interleaved, random_cache, random_ids, report, table_of

import kveraser as kv
from kveraser.eraser import default_eraser
from kveraser.methods import as_method

PREFIX = 512
CHOICES = ("full-recompute", "kveraser")


def erased_and_restored(
    model: Any, cache: Any, ids: Any, span: kv.Span, method: str, eraser: kv.KVEraser
) -> tuple[float, str]:
    """Seconds of an erase, which is undone, and the method that was used."""
    receipt = kv.erase(model, cache, ids, span, as_method(method), eraser=eraser)
    kv.restore(cache, receipt)
    return receipt.seconds, receipt.method


def first(run: Callable[[], tuple[float, str]]) -> float:
    """The seconds alone."""
    return run()[0]


def main(
    repeats: Annotated[int, typer.Option(help="Timed turns.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for auto_choice.json.")] = None,
) -> None:
    """Time both choices and print what auto would have lost."""
    model, _ = kv.load_backbone()
    eraser = default_eraser(model)
    rows = []
    for size in (16, 64, 256):
        for suffix in (16, 48, 96, 192, 384, 1024):
            length = PREFIX + size + suffix
            cache, ids, span = random_cache(model, length), random_ids(model, length), kv.Span(PREFIX, PREFIX + size)
            runs = {m: partial(erased_and_restored, model, cache, ids, span, m, eraser) for m in (*CHOICES, "auto")}
            chosen = runs["auto"]()[1]
            seconds = interleaved(model, {m: partial(first, runs[m]) for m in CHOICES}, repeats, f"{size} + {suffix}")
            typical = {method: statistics.median(seconds[method]) for method in CHOICES}
            rows.append({"span": size, "suffix": suffix, "chosen": chosen, **{m: 1000 * t for m, t in typical.items()},
                         "regret": typical[chosen] / min(typical.values())})  # fmt: skip
    timed = [f"{method}, ms" for method in CHOICES]
    table = table_of(["span", "suffix", "auto chose"], [*timed, "regret"], f"prefix of {PREFIX} tokens, medians")
    for row in rows:
        numbers: list[Any] = [f"{row[method]:.0f}" for method in CHOICES]
        table.add_row(str(row["span"]), str(row["suffix"]), row["chosen"], *numbers, f"{row['regret']:.2f}")
    report("auto_choice", model, rows, table, None, output, as_json)


if __name__ == "__main__":
    typer.run(main)
