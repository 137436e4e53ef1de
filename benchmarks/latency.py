"""What an erase costs, by method, length of the context, size and place of the span.

    python benchmarks/latency.py [--exact | --full] [--model MODEL --eraser FOLDER] [--json] [--output FOLDER]

All methods that recompute some tokens recompute the same number of them, as in comparisons of quality.
Ratios are to full recomputation in the same context, to the same method in the shortest context (growth), and to the floor:
a plain forward of the span's tokens on an empty cache, which no method that computes new states can beat. States are
random. Contexts beyond the model's positions are for time alone. On a CPU full recomputation of a long context is run once.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure
from measuring import at_one_budget, interleaved, plain_forward, random_cache, random_ids, report, table_of

import kveraser as kv
from kveraser.eraser import shipped_eraser
from kveraser.model.backbone import DEFAULT_BACKBONE

TRAINED = "kveraser, trained"
"""The given eraser, or the one that ships; `kveraser` alone is what is taken by default."""
PLACES = {"early": 1 / 16, "quarter": 1 / 4, "middle": 1 / 2, "late": 7 / 8}
METHODS = (f"{TRAINED}:repair=0", TRAINED,
           *(name for name, kind in kv.methods().items() if kind.compared and kind.removes and not kind.exact))  # fmt: skip
EXACT, SLOW = "full-recompute", "selective-recompute"
FLOOR = "floor"
LONG = 4096
"""From here on, on a CPU, full recomputation is run once, with `--exact`, and selective recomputation too, with `--full`."""


def trained_eraser(model: Any, folder: Path | None) -> kv.KVEraser | None:
    """The eraser in a folder, or the one that ships; None where there is none."""
    try:
        return kv.KVEraser.from_pretrained(folder, model) if folder else shipped_eraser(model)
    except kv.EraserMismatchError:
        if folder:
            raise
        return None


def erasing(
    model: Any, cache: Any, ids: Any, span: kv.Span, method: str, eraser: kv.KVEraser | None
) -> Callable[[], float]:
    """Erase, undo, and say how long the erase took."""

    def run() -> float:
        trained = method.startswith(TRAINED)
        chosen = at_one_budget(method.replace(TRAINED, "kveraser"))
        receipt = kv.erase(model, cache, ids, span, chosen, eraser=eraser if trained else None)
        kv.restore(cache, receipt)
        return receipt.seconds

    return run


def figure(rows: list[dict[str, Any]]) -> Figure:
    """Milliseconds over the length of the context."""
    plot = Figure(figsize=(7, 4.5), layout="constrained")
    axes = plot.add_subplot()
    shown = [row for row in rows if row["span"] == 64 and row["place"] == "quarter"]
    for method, marker in zip(dict.fromkeys(row["method"] for row in shown), "sox^Dv*+P", strict=False):
        own = [row for row in shown if row["method"] == method]
        axes.plot([row["context"] for row in own], [row["milliseconds"] for row in own], marker=marker, label=method)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the context", ylabel="milliseconds of an erase",
             title="A span of 64 tokens at a quarter of the context")  # fmt: skip
    axes.set_xticks(sorted({row["context"] for row in shown}), sorted({row["context"] for row in shown}))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return plot


def main(
    exact: Annotated[
        bool, typer.Option("--exact", help="Also full recomputation of long contexts on a CPU, once.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Everything: 1K to 32K, three sizes, four places.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed turns of all cases of a group.")] = 7,
    model_name: Annotated[str, typer.Option("--model", "-m", help="The backbone.")] = DEFAULT_BACKBONE,
    folder: Annotated[Path | None, typer.Option("--eraser", help="A trained one; default the one that ships.")] = None,
    only: Annotated[list[int] | None, typer.Option("--length", help="Contexts of so many tokens; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder for latency.json and latency.png (latency_cuda on a GPU).")
    ] = None,
) -> None:
    """Time erases and print a table."""
    model, _ = kv.load_backbone(model_name)
    eraser = trained_eraser(model, folder)
    methods = [method for method in METHODS if eraser is not None or not method.startswith(TRAINED)]
    lengths = tuple(only or ((1024, 2048, 4096, 8192, 16384, 32768) if full else (1024, 8192, 32768)))
    shapes = [(64, "quarter")]
    if full:
        shapes += [(16, "quarter"), (256, "quarter"), (64, "early"), (64, "middle"), (64, "late")]
    caches = {length: (random_cache(model, length), random_ids(model, length)) for length in lengths}
    rows: list[dict[str, Any]] = []
    for size, place in shapes:
        cases: dict[tuple[str, int], Callable[[], Any]] = {
            (FLOOR, 0): lambda size=size: plain_forward(model, random_ids(model, size))  # type: ignore[misc]
        }
        slow: dict[tuple[str, int], Callable[[], Any]] = {}
        for length in lengths:
            start = min(int(length * PLACES[place]), length - size - 64)
            span = kv.Span(start, start + size)
            for method in (*methods, EXACT):
                run = erasing(model, *caches[length], span, method, eraser)
                if method not in (EXACT, SLOW) or length < LONG or model.device.type != "cpu":
                    cases[method, length] = run
                elif (full or (exact and method == EXACT)) and (size, place) == shapes[0]:
                    slow[method, length] = run
        found = interleaved(model, cases, repeats, f"{size} tokens, {place}")
        found |= interleaved(model, slow, 1, f"{size} tokens, {place}: the slow ones, once", warm_up=0)
        typical = {case: statistics.median(seconds) for case, seconds in found.items()}
        for (method, length), seconds in sorted(typical.items(), key=lambda item: item[0][1]):
            recomputing, first = typical.get((EXACT, length)), typical.get((method, lengths[0]))
            rows.append({
                "method": method, "context": length, "span": size, "place": place, "milliseconds": 1000 * seconds,
                "over_floor": seconds / typical[FLOOR, 0], "growth": first and seconds / first,
                "faster_than_recomputing": recomputing and recomputing / seconds, "seconds": found[method, length],
            })  # fmt: skip
    table = table_of(
        ["span", "place", "context", "method"], ("ms", "/ floor", "growth", "recompute /"), title="erasing, medians"
    )
    for row in rows:
        numbers = [row["milliseconds"], row["over_floor"], row["growth"], row["faster_than_recomputing"]]
        shown = [
            "" if number is None else f"{number:.{digits}f}"
            for number, digits in zip(numbers, (1, 2, 2, 1), strict=True)
        ]
        table.add_row(str(row["span"]), row["place"], str(row["context"] or ""), row["method"], *shown)
    facts = {} if model_name == DEFAULT_BACKBONE else {"model": model_name}
    name = (
        "latency" if model.device.type == "cpu" else f"latency_{model.device.type}"
    )  # each kind of machine has its own
    report(name, model, rows, table, figure([row for row in rows if row["context"]]), output, as_json, facts)


if __name__ == "__main__":
    typer.run(main)
