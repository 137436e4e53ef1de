"""Erasing inside llama.cpp: distance to its own full recomputation, and the cost of an erase.

    python benchmarks/engine_llama_cpp.py quality [-t needle] [-m kveraser] [--limit 1] [--lengths 1024] [--model FILE] [--kind q8_0] [--output FOLDER]
    python benchmarks/engine_llama_cpp.py choice [-t needle] [--limit 1] [--lengths 1024] [--output FOLDER]
    python benchmarks/engine_llama_cpp.py latency [--lengths 1024 --lengths 8192] [--repeats 5] [--model FILE] [--output FOLDER]

`choice`: the embedded model in float32, here and in transformers: whether both choose the same runs. `quality`: held-out examples of the tasks, question asked after the erase / already cached; KL(full recomputation || method)
in nats per token of full recomputation's answer; what each context gave is kept as it comes, and summed up as in `distances.py`. `latency`: medians of interleaved runs, a 64-token span at a quarter of
the context, CPU seconds where there is one thread; "behind" is the recomputation of everything behind the span, "all" the
reading of the whole context.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from distances import earlier, of_context, record, summarise
from measuring import at_one_budget, engine_environment, report_table, table_of, write_json

import kveraser as kv
from kveraser.engines.llama_cpp import LlamaCppContext, LlamaCppModel
from kveraser.engines.llama_cpp.library import VERSION
from kveraser.evaluation import compare_methods, read_parts
from kveraser.evaluation.compare import PROTOCOLS
from kveraser.evaluation.metrics import leaks
from kveraser.evaluation.runner import EvalOptions, draw
from kveraser.export import write_gguf_backbone
from kveraser.methods import as_method, method_label
from kveraser.methods.choosing import CHOSEN
from kveraser.model.backbone import embedded_gguf
from kveraser.tasks import Filler, tasks
from kveraser.tasks.sources import read_passages

app = typer.Typer(help=__doc__, no_args_is_help=True)
METHODS = (
    "no-erase",
    "delete-and-shift",
    "local-suffix-repair:tokens=70",
    "attention-guided-repair:tokens=70",
    "kveraser:repair=0",
    "kveraser:block=8,repair=70",
    "kveraser:repair=70",
    "kveraser:block=32,repair=70",
)
Model = Annotated[Path | None, typer.Option(help="GGUF file; default the embedded one.")]
Lengths = Annotated[list[int] | None, typer.Option(help="Tokens of the contexts.")]
Tasks = Annotated[list[str] | None, typer.Option("-t", "--task", help="Tasks; default all with their own sources.")]
Threads = Annotated[int, typer.Option(help="Threads of llama.cpp.")]
Type = Annotated[str, typer.Option(help="Type of the cached keys and values.")]
Output = Annotated[Path | None, typer.Option(help="Folder for the JSON file.")]


def facts(model: LlamaCppModel, kind: str) -> dict[str, Any]:
    """What a benchmark was made with."""
    return engine_environment(
        model=model.identity(), **{"llama-cpp-python": VERSION}, threads=model.threads, cache=kind
    )


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
    rows = earlier(output, "llama_cpp_choice")
    document = {"benchmark": "llama_cpp_choice", "environment": facts(loaded, "f32"), "readers": CHOSEN, "rows": rows}
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
        write_json("llama_cpp_choice", document, output)
        print(rows[-1])
    table = table_of(
        ["task"],
        ("tokens", "recomputed", "of them here as well", "residual", "here"),
        title=f"the same runs in {sum(row['equal'] for row in rows)} of {len(rows)}",
    )
    for row in rows:
        residuals = ("" if residual is None else f"{residual:.6f}" for residual in row["residuals"])
        table.add_row(row["task"], str(row["tokens"]), str(row["of"]), str(row["same"]), *residuals)
    report_table("llama_cpp_choice", document, table, output)


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
    environment = facts(loaded, kind)
    options = EvalOptions(tuple(task or _own_tasks()), tuple(lengths or (256,)), PROTOCOLS, tuple(chosen), limit)
    filler = Filler(read_passages(), lambda text: len(loaded.tokenizer.encode(text, add_special_tokens=False)))
    file = f"llama_cpp_quality_{loaded.file.stem}_{kind}"
    rows = earlier(output, file)
    for drawn in draw(options, filler):
        for protocol in PROTOCOLS:
            row = of_context(rows, drawn, protocol)
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
            record(file, rows, environment, output)
    summarise(file, {"rows": rows, "environment": environment}, output)


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
                receipt = context.erase(span, at_one_budget(method))
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
    first = min(found)
    rows = [
        {"method": method, "context": length, "span": span_tokens, "measured": repeats if (length, method) in times else 1,
         "seconds": seconds, "growth": seconds / found[first][method], "times_behind": at["behind"] / seconds}
        for length, at in found.items() for method, seconds in at.items()
    ]  # fmt: skip
    table = table_of(
        ["method"],
        ("context", "runs", "seconds", "growth", "behind / it"),
        title=f"a span of {span_tokens} tokens, medians",
    )
    for row in rows:
        table.add_row(row["method"], str(row["context"]), str(row["measured"]), f"{row['seconds']:.3f}", f"{row['growth']:.2f}",
                      f"{row['times_behind']:.1f}")  # fmt: skip
    clocked = {"clock": "CPU" if threads == 1 else "wall", **facts(loaded, kind)}
    report_table(
        "llama_cpp_latency", {"benchmark": "llama_cpp_latency", "environment": clocked, "rows": rows}, table, output
    )


if __name__ == "__main__":
    app()
