"""What a user waits for: erase, read the question, first token.

python benchmarks/first_token.py [--full] [--json] [--output FOLDER]
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import at_one_budget, interleaved, random_cache, random_ids, report, table_of, wait

import kveraser as kv
from kveraser.cache import cache_length
from kveraser.eraser import default_eraser

METHODS = ("full-recompute", "kveraser", "kveraser:repair=0", "delete-and-shift", "local-suffix-repair")
SPAN, QUESTION = 64, 24


@torch.no_grad()
def first_token(model: Any, cache: Any, ids: Any, question: Any, method: str, eraser: kv.KVEraser) -> float:
    """Seconds from the wish to erase to the first token; afterwards everything is undone."""
    length = cache_length(cache)
    span = kv.Span(length // 4, length // 4 + SPAN)
    started = time.perf_counter()
    receipt = kv.erase(model, cache, ids, span, at_one_budget(method), eraser=eraser)
    after = cache_length(cache)
    positions = torch.arange(after, after + QUESTION, device=question.device)[None]
    model(question, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits.argmax(-1)
    wait(model)
    seconds = time.perf_counter() - started
    cache.crop(after - cache_length(cache))
    kv.restore(cache, receipt)
    return seconds


def main(
    full: Annotated[bool, typer.Option("--full", help="Also 8K tokens.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for first_token.json.")] = None,
) -> None:
    """Time first tokens and print a table."""
    model, _ = kv.load_backbone()
    eraser, question = default_eraser(model), random_ids(model, QUESTION, seed=1)
    rows = []
    for length in (1024, 4096, 8192) if full else (1024, 4096):
        cache, ids = random_cache(model, length), random_ids(model, length)
        runs = {method: partial(first_token, model, cache, ids, question, method, eraser) for method in METHODS}
        seconds = interleaved(model, runs, 3, f"{length} tokens")
        exact = statistics.median(seconds[METHODS[0]])
        rows += [
            {"method": method, "context": length, "milliseconds": 1000 * statistics.median(seconds[method]),
             "faster_than_recomputing": exact / statistics.median(seconds[method]), "seconds": seconds[method]}
            for method in METHODS
        ]  # fmt: skip
    table = table_of(
        ["context", "method"],
        ("ms", "recompute /"),
        title=f"erase {SPAN} tokens, read {QUESTION}, first token; medians",
    )
    for row in rows:
        table.add_row(
            str(row["context"]), row["method"], f"{row['milliseconds']:.0f}", f"{row['faster_than_recomputing']:.1f}"
        )
    report("first_token", model, rows, table, None, output, as_json)


if __name__ == "__main__":
    typer.run(main)
