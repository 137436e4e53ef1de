"""Where the time of an erase goes: telling who has read the span, finding the keys they need, recomputing them.

    python benchmarks/readers.py [--full] [--json] [--output FOLDER]

A span of 64 tokens at a quarter of the context, 64 readers, the neutral eraser. States are random.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from measuring import interleaved, random_cache, random_ids, report
from rich.table import Table

import kveraser as kv
from kveraser.cache import Tokens
from kveraser.eraser import default_eraser
from kveraser.readers import ModelSource, Scene

SPAN, READERS, CANDIDATES, KEYS = 64, 64, 512, 1536
PARTS = ("scan", "close look", "keys", "whole erase")


def main(
    full: Annotated[bool, typer.Option("--full", help="1K to 32K tokens instead of 1K, 8K and 32K.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed turns of all cases.")] = 7,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for readers.json and readers.png.")] = None,
) -> None:
    """Time the parts of an erase and print a table."""
    model, _ = kv.load_backbone()
    calibration = default_eraser(model).calibration
    assert calibration is not None
    cases: dict[tuple[str, int], Any] = {}
    for length in (1024, 2048, 4096, 8192, 16384, 32768) if full else (1024, 8192, 32768):
        cache, ids = random_cache(model, length), random_ids(model, length)
        span = kv.Span(length // 4, length // 4 + SPAN)
        scene = Scene.of(ModelSource(model, cache), Tokens(ids), (span,), (), calibration)
        slots = scene.suffix
        some = slots[torch.linspace(0, len(slots) - 1, CANDIDATES).long()]

        def erase(cache: Any = cache, ids: Any = ids, span: kv.Span = span) -> float:
            receipt = kv.erase(model, cache, ids, span, kv.Steering(repair=READERS))
            kv.restore(cache, receipt)
            return receipt.seconds

        cases["scan", length] = scene.thin
        cases["close look", length] = lambda scene=scene, some=some: scene.close(some)  # type: ignore[misc]
        cases["keys", length] = lambda scene=scene, some=some: scene.needed(some[:: CANDIDATES // READERS], KEYS)  # type: ignore[misc]
        cases["whole erase", length] = erase
    found = interleaved(model, {case: _seconds(run) for case, run in cases.items()}, repeats, "parts of an erase")
    typical = {case: 1000 * statistics.median(seconds) for case, seconds in found.items()}
    lengths = sorted({length for _, length in typical})
    table = Table("milliseconds", *map(str, lengths), "growth", title="where the time of an erase goes")
    rows = []
    for part in PARTS:
        times = [typical[part, length] for length in lengths]
        rows += [{"part": part, "context": n, "milliseconds": t} for n, t in zip(lengths, times, strict=True)]
        table.add_row(part, *(f"{t:.1f}" for t in times), f"{times[-1] / times[0]:.2f}")
    plot = Figure(figsize=(7, 4.5), layout="constrained")
    axes = plot.add_subplot()
    for part in PARTS:
        axes.plot(lengths, [typical[part, length] for length in lengths], marker="o", label=part)
    axes.set(
        xscale="log", xlabel="tokens in the context", ylabel="milliseconds", title="Where the time of an erase goes"
    )
    axes.legend()
    report("readers", model, rows, table, plot, output, as_json)


def _seconds(run: Any) -> Any:
    """Run something, and let the caller time it unless it says itself how long it took."""

    def timed() -> float | None:
        told = run()
        return told if isinstance(told, float) else None

    return timed


if __name__ == "__main__":
    typer.run(main)
