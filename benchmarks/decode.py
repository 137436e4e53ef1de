"""Decoding with the growable cache layer against transformers' `DynamicCache`.

    python benchmarks/decode.py [--full] [--json] [--output FOLDER]

All decode the same tokens from the same states, in turns. Contexts run the model in a view with an attention that is faster on
CPUs (`kveraser.model.attention`).
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import interleaved, peak_bytes, random_cache, random_ids, report, table_of
from transformers.cache_utils import DynamicCache

import kveraser as kv
from kveraser.cache import growable_cache
from kveraser.demo.stories import pages
from kveraser.model.attention import for_decoding

KINDS = ("DynamicCache", "growable", "growable, as in contexts")
POSITIONS = 8192
"""Of the model; longer contexts have random states, and are for time alone."""


def read_text(model: Any, tokenizer: Any, tokens: int) -> Any:
    """The cache of a context of real text, so that the most likely tokens are no ties."""
    context = kv.ErasableContext(model, tokenizer)
    text = context.encode("\n\n".join(pages()))
    context.append((text * (1 + tokens // len(text)))[:tokens])
    return context.cache


def copied(cache: Any, *, growable: bool) -> Any:
    """The same states in a cache of either kind."""
    new = growable_cache() if growable else DynamicCache()
    for index, layer in enumerate(cache.layers):
        new.update(layer.keys.clone(), layer.values.clone(), index)
    return new


@torch.no_grad()
def decode(model: Any, cache: Any, first: torch.Tensor, steps: int) -> list[int]:
    """Greedy tokens; afterwards the cache is as it was."""
    length, token, said = cache.get_seq_length(), first, []
    for step in range(steps):
        positions = torch.tensor([[length + step]], device=first.device)
        logits = model(token, position_ids=positions, past_key_values=cache, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(token))
    cache.crop(length - cache.get_seq_length())
    return said


def main(
    full: Annotated[bool, typer.Option("--full", help="Also 32K tokens, and more repeats.")] = False,
    steps: Annotated[int, typer.Option(help="Tokens per turn.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for decode.json.")] = None,
) -> None:
    """Time decoding and print a table."""
    model, tokenizer = kv.load_backbone()
    rows = []
    for length in (1024, 8000, 32768) if full else (1024, 8000):
        read = read_text(model, tokenizer, length) if length <= POSITIONS - steps else random_cache(model, length)
        caches = {kind: copied(read, growable=kind != KINDS[0]) for kind in KINDS}
        first = random_ids(model, 1)
        models = {kind: model if kind != KINDS[-1] else for_decoding(model) for kind in KINDS}
        runs = {kind: partial(decode, models[kind], caches[kind], first, steps) for kind in KINDS}
        said = {kind: run() for kind, run in runs.items()}
        seconds = interleaved(model, runs, 9 if full else 5, f"{length} tokens")
        peaks = {kind: peak_bytes(model, run)[0] for kind, run in runs.items()}
        for kind in KINDS:
            rows.append({
                "cache": kind, "context": length, "tokens_per_second": steps / statistics.median(seconds[kind]),
                "speedup": statistics.median(seconds[KINDS[0]]) / statistics.median(seconds[kind]),
                "peak_bytes": peaks[kind], "same_tokens": said[kind] == said[KINDS[0]], "seconds": seconds[kind],
            })  # fmt: skip
    table = table_of(
        ["context", "cache"],
        ("tokens/s", "speed-up", "peak MiB", "same tokens"),
        title=f"decoding {steps} tokens, medians",
    )
    for row in rows:
        table.add_row(str(row["context"]), row["cache"], f"{row['tokens_per_second']:.1f}", f"{row['speedup']:.2f}",
                      f"{row['peak_bytes'] / 2**20:.1f}", str(row["same_tokens"]))  # fmt: skip
    report("decode", model, rows, table, None, output, as_json)


if __name__ == "__main__":
    typer.run(main)
