"""Where the time of one erase goes: PyTorch's profiler over a few of them.

python benchmarks/profile_erase.py [METHOD] [--tokens 2048] [--span 64] [--rows 15]
"""

from __future__ import annotations

import time
from typing import Annotated

import typer
from measuring import plain_forward, random_cache, random_ids, wait
from torch.profiler import ProfilerActivity, profile

import kveraser as kv
from kveraser.eraser import shipped_eraser
from kveraser.methods import as_method

MATMULS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn::_linear_pointwise", "aten::mkldnn_linear")
TURNS = 5


def main(
    method: Annotated[
        str, typer.Argument(help="What to profile; `floor` is a plain forward of the span.")
    ] = "kveraser",
    tokens: Annotated[int, typer.Option(help="Length of the context.")] = 2048,
    span: Annotated[int, typer.Option(help="Tokens of the span.")] = 64,
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 15,
) -> None:
    """Print the operations that take the most time, and what is outside of all operations."""
    model, _ = kv.load_backbone()
    eraser, cache, ids = shipped_eraser(model), random_cache(model, tokens), random_ids(model, tokens)
    where = kv.Span(tokens // 4, tokens // 4 + span)

    def once() -> None:
        if method == "floor":
            plain_forward(model, ids[:, where.slice])
        else:
            kv.restore(cache, kv.erase(model, cache, ids, where, as_method(method), eraser=eraser))

    once()
    wait(model)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        started = time.perf_counter()
        for _ in range(TURNS):
            once()
        wait(model)
        wall = 1000 * (time.perf_counter() - started) / TURNS
    averages = seen.key_averages()
    inside = sum(entry.self_cpu_time_total for entry in averages) / 1000 / TURNS
    matmuls = sum(entry.self_cpu_time_total for entry in averages if entry.key in MATMULS) / 1000 / TURNS
    print(averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40))
    print(f"{method}: {wall:.1f} ms (profiled); matrix products {matmuls:.1f}, other operations {inside - matmuls:.1f}, "
          f"Python {wall - inside:.1f}")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
