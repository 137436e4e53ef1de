"""Erasing inside llama.cpp: distance to its own full recomputation, and the cost of an erase.

    python benchmarks/engine_llama_cpp.py quality [--limit 1] [--lengths 256 --lengths 1024] [--model FILE] [--keys f16] [--output FOLDER]
    python benchmarks/engine_llama_cpp.py latency [--lengths 1024 --lengths 8192] [--repeats 5] [--output FOLDER]

`quality`: held-out examples of the tasks, question asked after the erase / already cached; KL(full recomputation || method)
in nats per token of full recomputation's answer. `latency`: medians of interleaved runs, a 64-token span at a quarter of
the context, CPU seconds where there is one thread; "behind" is the recomputation of everything behind the span, "all" the
reading of the whole context.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

import kveraser as kv
from kveraser.engines.llama_cpp import LlamaCppContext, LlamaCppModel
from kveraser.engines.llama_cpp.library import VERSION
from kveraser.evaluation import compare_methods, read_parts
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.evaluation.metrics import leaks
from kveraser.evaluation.runner import EvalOptions, draw
from kveraser.methods import as_method
from kveraser.tasks import Filler, tasks
from kveraser.tasks.sources import read_passages

app = typer.Typer(help=__doc__, no_args_is_help=True)
METHODS = ("no-erase", "full-recompute", "delete-and-shift", "kveraser:repair=0", "kveraser")
Model = Annotated[Path | None, typer.Option(help="GGUF file; default the embedded one.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Tokens of the contexts.")]
Threads = Annotated[int, typer.Option(help="Threads of llama.cpp.")]
Type = Annotated[str, typer.Option(help="Type of the cached keys and values.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the JSON file.")]


def report(name: str, found: dict[str, Any], model: LlamaCppModel, kind: str, output: Path | None) -> None:
    """Write a benchmark's JSON file."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        facts = {"model": model.identity(), "llama-cpp-python": VERSION, "threads": model.threads, "cache": kind,
                 "machine": platform.machine(), "python": platform.python_version(), "kveraser": kv.__version__}  # fmt: skip
        (output / f"{name}.json").write_text(json.dumps({**found, "environment": facts}, indent=1) + "\n")


@app.command()
def quality(
    limit: Annotated[int, typer.Option(help="Examples per task and length.")] = 1,
    lengths: Lengths = None,
    model: Model = None,
    kind: Type = "f16",
    threads: Threads = 2,
    output: Output = None,
) -> None:
    """KL to full recomputation, per method."""
    loaded = LlamaCppModel(model, threads=threads)
    eraser = loaded.find_eraser(check_weights=model is None)
    chosen = [as_method(name) for name in METHODS]
    names = tuple(name for name, task in tasks().items() if not task.takes_source or name == "document-qa")
    options = EvalOptions(names, tuple(lengths or (256,)), PROTOCOLS, tuple(chosen), limit)
    filler = Filler(read_passages(), lambda text: len(loaded.tokenizer.encode(text, add_special_tokens=False)))
    rows: list[dict[str, Any]] = []
    for drawn in draw(options, filler):
        for protocol in PROTOCOLS:
            context = LlamaCppContext(loaded, eraser, length=4096, keys=kind, values=kind)
            spans = read_parts(context, drawn.example.parts)
            question: str | None = drawn.example.question
            if protocol == "query_cached":
                context.append(drawn.example.question)
                question = None
            for result in compare_methods(context, spans, question, chosen, max_new_tokens=12, min_new_tokens=1):
                erased = drawn.example.erased
                leak = bool(erased) and leaks(result.answer, erased or "")
                rows.append({"task": drawn.task, "length": drawn.length, "protocol": protocol, "leak": leak,
                             "tokens": len(context), **result.as_dict()})  # fmt: skip
            context.close()
    report("llama_cpp_quality", {"rows": rows}, loaded, kind, output)
    table = Table("method", *(f"KL at {length}" for length in options.lengths), "leaks", "ms", box=None)
    for name in METHODS:
        mine = [row for row in rows if row["method"] == name]

        def mean(length: int, protocol: str, mine: list[dict[str, Any]] = mine) -> str:
            found = [row["kl"] for row in mine if (row["length"], row["protocol"]) == (length, protocol)]
            return f"{statistics.mean(found):.3f}"

        cells = [f"{mean(length, PROTOCOLS[0])} / {mean(length, PROTOCOLS[1])}" for length in options.lengths]
        count = f"{sum(row['leak'] for row in mine)} of {len(mine)}"
        table.add_row(name, *cells, count, f"{statistics.mean(row['milliseconds'] for row in mine):.0f}")
    Console(width=110).print(table)


@app.command()
def latency(
    lengths: Lengths = None,
    repeats: Annotated[int, typer.Option(help="Erases per method and length.")] = 5,
    span_tokens: Annotated[int, typer.Option(help="Tokens of the span.")] = 64,
    model: Model = None,
    kind: Type = "f16",
    threads: Threads = 1,
    room: Annotated[int, typer.Option(help="Cells of every context; 0: as many as it has tokens.")] = 0,
    output: Output = None,
) -> None:
    """Seconds of an erase as the context grows."""
    # With one thread all is computed in this one, so that other work on the machine does not count.
    clock = time.process_time if threads == 1 else time.perf_counter
    loaded = LlamaCppModel(model, threads=threads)
    eraser = loaded.find_eraser()
    text = loaded.tokenizer.encode(" ".join(read_passages()[:400]), add_special_tokens=False)
    found: dict[int, dict[str, float]] = {}
    contexts = {}
    for length in lengths or (1024, 8192):
        context = LlamaCppContext(loaded, eraser, length=room or length, keys=kind, values=kind)
        start = length // 4
        started = clock()
        context.append(text[:start])
        span = context.append(text[start : start + span_tokens])
        context.append(text[start + span_tokens : length])
        found[length] = {"all": clock() - started}
        contexts[length] = (context, span)
    times: dict[tuple[int, str], list[float]] = {}
    for turn in range(repeats + 1):  # the first turn warms up
        for length, (context, span) in contexts.items():
            for method in ("kveraser", "kveraser:repair=0", "delete-and-shift"):
                started = clock()
                receipt = context.erase(span, method)
                if turn:
                    times.setdefault((length, method), []).append(clock() - started)
                context.restore(receipt)
    for length, (context, span) in contexts.items():
        started = clock()
        receipt = context.erase(span, "full-recompute")
        found[length]["behind"] = clock() - started
        context.restore(receipt)
    for (length, method), seconds in times.items():
        found[length][method] = statistics.median(seconds)
    report("llama_cpp_latency", {"seconds": found, "span": span_tokens}, loaded, kind, output)
    table = Table("method", *(f"{length} tokens, s" for length in found), "growth", "behind / erase", box=None)
    first, last = min(found), max(found)
    for name in ("kveraser", "kveraser:repair=0", "delete-and-shift", "behind", "all"):
        row = [found[length][name] for length in found]
        ratio = found[last]["behind"] / found[last][name]
        table.add_row(name, *(f"{s:.3f}" for s in row), f"{found[last][name] / found[first][name]:.2f}", f"{ratio:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    app()
