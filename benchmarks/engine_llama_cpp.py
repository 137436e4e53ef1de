"""Erasing inside llama.cpp: distance to its own full recomputation, and the cost of an erase.

    python benchmarks/engine_llama_cpp.py quality [-t needle] [-m kveraser] [--limit 1] [--lengths 1024] [--model FILE] [--kind q8_0] [--output FOLDER]
    python benchmarks/engine_llama_cpp.py choice [-t needle] [--limit 1] [--lengths 1024] [--output FOLDER]
    python benchmarks/engine_llama_cpp.py latency [--lengths 1024 --lengths 8192] [--repeats 5] [--model FILE] [--output FOLDER]

`choice`: the embedded model in float32, here and in transformers: whether both choose the same runs. `quality`: held-out examples of the tasks, question asked after the erase / already cached; KL(full recomputation || method)
in nats per token of full recomputation's answer. `latency`: medians of interleaved runs, a 64-token span at a quarter of
the context, CPU seconds where there is one thread; "behind" is the recomputation of everything behind the span, "all" the
reading of the whole context.
"""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
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
from kveraser.export import write_gguf_backbone
from kveraser.methods import as_method, method_label
from kveraser.model.backbone import embedded_gguf
from kveraser.tasks import Filler, tasks
from kveraser.tasks.sources import read_passages

app = typer.Typer(help=__doc__, no_args_is_help=True)
METHODS = (
    "no-erase",
    "delete-and-shift",
    "local-suffix-repair:tokens=64",
    "attention-guided-repair",
    "kveraser:repair=0",
    "kveraser:block=8",
    "kveraser",
    "kveraser:block=32",
)
Model = Annotated[Path | None, typer.Option(help="GGUF file; default the embedded one.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Tokens of the contexts.")]
Tasks = Annotated[list[str] | None, typer.Option("-t", "--task", help="Tasks; default all with their own sources.")]
Threads = Annotated[int, typer.Option(help="Threads of llama.cpp.")]
Type = Annotated[str, typer.Option(help="Type of the cached keys and values.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the JSON file.")]


def report(name: str, found: dict[str, Any], model: LlamaCppModel, kind: str, output: Path | None) -> None:
    """Write a benchmark's JSON file."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        facts = {"model": model.identity(), "llama-cpp-python": VERSION, "threads": model.threads, "cache": kind,
                 "machine": platform.machine(), "python": platform.python_version(), "kveraser": kv.__version__}  # fmt: skip
        (output / f"{name}.json").write_text(json.dumps({**found, "environment": facts}) + "\n")


@app.command()
def choice(
    limit: Annotated[int, typer.Option(help="Examples per task and length.")] = 1,
    lengths: Lengths = None,
    task: Tasks = None,
    threads: Threads = 1,
    output: Output = None,
) -> None:
    """Whether the same runs are chosen as in transformers, from the same weights."""
    model, tokenizer = kv.load_backbone(dtype=torch.float32)
    folder = tempfile.TemporaryDirectory()
    file = Path(folder.name) / "f32.gguf"
    write_gguf_backbone(embedded_gguf(), file, dtype="f32")
    loaded = LlamaCppModel(file, threads=threads)
    neutral = kv.KVEraser.neutral(model)
    neutral.calibration = loaded.neutral_eraser().calibration
    options = EvalOptions(
        tuple(task or _own_tasks()), tuple(lengths or (1024,)), PROTOCOLS, (as_method("kveraser"),), limit
    )
    filler = Filler(read_passages(), lambda text: len(tokenizer.encode(text, add_special_tokens=False)))
    rows = _earlier(output, "llama_cpp_choice")
    for drawn in draw(options, filler):
        key = {"task": drawn.task, "length": drawn.length, "index": drawn.index}
        if any(key.items() <= row.items() for row in rows):
            continue
        theirs = kv.ErasableContext(model, tokenizer, neutral)
        spans = read_parts(theirs, [*drawn.example.parts, (drawn.example.question, False)])
        ours = LlamaCppContext(loaded, length=4096, keys="f32", values="f32", flash_attention=False)
        ours.append(theirs.live_ids)
        wanted, found = (theirs.erase(spans, kv.Steering(block=16, keys=None)), ours.erase(spans))
        same = sum(
            len(range(max(a.start, b.start), min(a.end, b.end))) for a in wanted.recomputed for b in found.recomputed
        )
        rows.append({**key, "tokens": len(ours), "equal": wanted.recomputed == found.recomputed, "same": same,
                     "of": wanted.tokens_recomputed, "residuals": [wanted.residual, found.residual]})  # fmt: skip
        ours.close()
        report("llama_cpp_choice", {"rows": rows}, loaded, "f32", output)
        print(rows[-1])
    print(f"the same runs in {sum(row['equal'] for row in rows)} of {len(rows)}")


def _own_tasks() -> tuple[str, ...]:
    return tuple(name for name, each in tasks().items() if not each.takes_source or name == "document-qa")


@app.command()
def quality(
    limit: Annotated[int, typer.Option(help="Examples per task and length.")] = 1,
    lengths: Lengths = None,
    task: Tasks = None,
    method: Annotated[list[str] | None, typer.Option("-m", "--method", help="Methods; default some.")] = None,
    model: Model = None,
    kind: Type = "f16",
    threads: Threads = 2,
    output: Output = None,
) -> None:
    """KL to full recomputation, per method. With --output, a run that was cut off goes on where it was."""
    loaded = LlamaCppModel(model, threads=threads)
    chosen = [as_method(name) for name in method or METHODS]
    labels = [method_label(each) for each in chosen]
    options = EvalOptions(tuple(task or _own_tasks()), tuple(lengths or (256,)), PROTOCOLS, tuple(chosen), limit)
    filler = Filler(read_passages(), lambda text: len(loaded.tokenizer.encode(text, add_special_tokens=False)))
    file = f"llama_cpp_quality_{loaded.file.stem}_{kind}"
    rows = _earlier(output, file)
    for drawn in draw(options, filler):
        for protocol in PROTOCOLS:
            key = {"task": drawn.task, "length": drawn.length, "index": drawn.index, "protocol": protocol}
            row = next((row for row in rows if key.items() <= row.items()), {**key, "methods": {}})
            missing = [each for each, label in zip(chosen, labels, strict=True) if label not in row["methods"]]
            if not missing:
                continue
            context = LlamaCppContext(loaded, length=4096, keys=kind, values=kind)
            spans = read_parts(context, drawn.example.parts)
            question: str | None = drawn.example.question
            if protocol == "query_cached":
                context.append(drawn.example.question)
                question = None
            run = [as_method("full-recompute"), *missing]
            exact, *found = compare_methods(context, spans, question, run, max_new_tokens=12, min_new_tokens=1)
            erased = drawn.example.erased
            for result in found:
                row["methods"][result.method] = {
                    "kl": round(result.kl, 6), "same": result.answer == exact.answer,
                    "leak": bool(erased) and leaks(result.answer, erased or ""), "ms": round(result.milliseconds),
                    "recomputed": result.tokens_recomputed,
                    "residual": None if result.residual is None else round(result.residual, 3),
                }  # fmt: skip
            row["tokens"] = len(context)
            rows += [] if row in rows else [row]
            context.close()
            report(file, {"rows": rows}, loaded, kind, output)
    _show_quality(rows, labels, options.lengths)


def _earlier(output: Path | None, name: str) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    if output is None or not (output / f"{name}.json").exists():
        return []
    rows: list[dict[str, Any]] = json.loads((output / f"{name}.json").read_text())["rows"]
    return rows


def _show_quality(rows: list[dict[str, Any]], labels: Sequence[str], lengths: Sequence[int]) -> None:
    heads = [f"KL at {length}, mean; median" for length in lengths]
    table = Table("method", *heads, "same answer", "leaks", "ms", "tokens", box=None)
    for label in labels:
        mine = [(row, row["methods"][label]) for row in rows if label in row["methods"]]

        def shown(length: int, mine: list[Any] = mine) -> str:
            by = [
                [m["kl"] for row, m in mine if (row["length"], row["protocol"]) == (length, each)] for each in PROTOCOLS
            ]
            means, medians = ([f"{of(kls):.4f}" for kls in by] for of in (statistics.mean, statistics.median))
            return f"{' / '.join(means)}; {' / '.join(medians)}"

        count = len(mine)
        table.add_row(
            label, *map(shown, lengths), f"{sum(m['same'] for _, m in mine)} of {count}",
            f"{sum(m['leak'] for _, m in mine)} of {count}", f"{statistics.median(m['ms'] for _, m in mine):.0f}",
            f"{statistics.mean(m['recomputed'] for _, m in mine):.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


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
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    loaded = LlamaCppModel(model, threads=threads)
    text = loaded.tokenizer.encode(" ".join(read_passages()[:400]), add_special_tokens=False)
    found: dict[int, dict[str, float]] = {}
    contexts = {}
    for length in lengths or (1024, 8192):
        context = LlamaCppContext(loaded, length=room or length, keys=kind, values=kind)
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
