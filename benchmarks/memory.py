"""What an erase takes in memory: peak bytes beyond the cache, and bytes written into it.

    python benchmarks/memory.py [--full] [--json] [--output FOLDER]

The yardsticks are the span's own keys and values, and what a plain forward of the span's tokens takes at most.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from measuring import at_one_budget, peak_bytes, plain_forward, random_cache, random_ids, report, table_of

import kveraser as kv
from kveraser.cache import snapshot, state_bytes
from kveraser.eraser import shipped_eraser

METHODS = ("kveraser", "kveraser:repair=0", "delete-and-shift", "local-suffix-repair", "full-recompute")
SPAN = 64


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Peak bytes over the length of the context."""
    plot = Figure(figsize=(7, 4.5), layout="constrained")
    axes = plot.add_subplot()
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows), "sox^Dv", strict=False):
        own = [row for row in rows if row["method"] == method]
        axes.plot(
            [row["context"] for row in own], [row["peak_bytes"] / 2**20 for row in own], marker=marker, label=method
        )
    axes.set(xscale="log", yscale="log", xlabel="tokens in the context", ylabel="peak MiB during an erase")
    axes.grid(alpha=0.3)
    axes.legend()
    return plot


def main(
    full: Annotated[bool, typer.Option("--full", help="All lengths, and full recomputation.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for memory.json and memory.png.")] = None,
) -> None:
    """Measure memory and print a table."""
    model, _ = kv.load_backbone()
    eraser = shipped_eraser(model)
    forward, _ = peak_bytes(model, partial(plain_forward, model, random_ids(model, SPAN)))
    rows = []
    for length in (1024, 4096, 8192, 32768) if full else (1024, 8192, 32768):
        cache, ids = random_cache(model, length), random_ids(model, length)
        span = kv.Span(length // 4, length // 4 + SPAN)
        own = state_bytes(snapshot(cache, span))
        for method in METHODS if full and length <= 8192 else METHODS[:-1]:
            erase = partial(kv.erase, model, cache, ids, span, at_one_budget(method), eraser=eraser)
            kv.restore(cache, erase())  # what is set up at first use is not the erase's
            peak, receipt = peak_bytes(model, erase)
            kv.restore(cache, receipt)
            rows.append({
                "method": method, "context": length, "span": SPAN, "span_bytes": own, "peak_bytes": peak,
                "forward_bytes": forward, "over_span": (peak - forward) / own,
                "bytes_written": receipt.bytes_written,
            })  # fmt: skip
    table = table_of(
        ["context", "method"], ["peak MiB", "beyond a plain forward / span's K/V", "written MiB"],
        f"memory of an erase of {SPAN} tokens ({own / 2**20:.2f} MiB of keys and values)",
    )  # fmt: skip
    for row in rows:
        table.add_row(str(row["context"]), row["method"], f"{row['peak_bytes'] / 2**20:.1f}", f"{row['over_span']:.1f}",
                      f"{row['bytes_written'] / 2**20:.2f}")  # fmt: skip
    report("memory", model, rows, table, figure(rows), output, as_json)


if __name__ == "__main__":
    typer.run(main)
