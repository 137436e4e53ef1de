"""`kveraser demo`: four stories and a latency table, on a real model."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.panel import Panel
from rich.table import Table

from kveraser.cli.common import (
    DEFAULT_MODEL,
    DeviceOption,
    DtypeOption,
    EraserOption,
    JsonOption,
    ModelOption,
    load,
    print_json,
    progress_bar,
    reported,
    stdout,
)
from kveraser.cli.tables import results_table
from kveraser.demo.latency import SUFFIXES, latency_methods, measure_latency
from kveraser.demo.stories import stories
from kveraser.demo.tell import tell
from kveraser.erasable import ErasableContext
from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import OptionError
from kveraser.evaluation import PROTOCOLS, MethodResult, leaks
from kveraser.evaluation.compare import Context
from kveraser.methods import EraseMethod, as_method, methods

STORY_TOKENS, LATENCY_TOKENS = 2048, 5120


class Engine(StrEnum):
    """What computes."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama-cpp"


def demo_command(
    model: ModelOption = DEFAULT_MODEL,
    eraser: EraserOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: Annotated[
        Engine, typer.Option(help="What computes; llama-cpp takes GGUF files only.")
    ] = Engine.TRANSFORMERS,
    latency: Annotated[bool, typer.Option(help="Also measure how the cost grows with the suffix.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Erase spans from what a model has already read: four stories, every method, two ways to ask.

    "Asked after": the question comes after the erase. "Question was cached": the question had been read, with the span
    still there, when the span was erased; that is harder. KL is the distance to full recomputation, in nats per token
    of its answer; "run" is the number of tokens run through the model. An answer in red says what should be gone.

    Example: kveraser demo --no-latency
    """
    with reported(as_json):
        started = time.perf_counter()
        if engine is Engine.LLAMA_CPP:
            new_context, every = _llama_cpp(model, eraser, device, dtype)
        else:
            new_context, every = _transformers(model, eraser, device, dtype, as_json)
        timed = [method for method in latency_methods() if method in every]
        told: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        with progress_bar() as bar:
            steps = len(stories()) * len(every) * len(PROTOCOLS)
            task = bar.add_task("stories", total=steps + latency * len(SUFFIXES) * len(timed))
            for story in stories():
                after, cached = (
                    tell(story, new_context(STORY_TOKENS), every, protocol, done=lambda _: bar.advance(task))
                    for protocol in PROTOCOLS
                )
                told.append(_as_json(story.name, story.question, story.erased, after, cached))
                if not as_json:
                    said = f"[bold]{story.name}[/]: {story.use}\nerased: [italic]{story.span.strip()}[/]\nasked: {story.question}"
                    stdout.print()
                    stdout.print(Panel(said, expand=False))
                    stdout.print(results_table(after, cached, story.erased))
            if latency:
                bar.update(task, description="latency")
                rows = measure_latency(new_context(LATENCY_TOKENS), timed, done=lambda _: bar.advance(task))
        if as_json:
            print_json({"model": model, "engine": engine.value, "stories": told, "latency": rows})
            return
        if rows:
            stdout.print("\n[bold]Milliseconds of an erase as the suffix grows[/] (64-token span, 256-token prefix)")
            stdout.print(_latency_table(rows))
        _verdict(told)
        stdout.print(f"[dim]{time.perf_counter() - started:.0f} seconds in all[/]")


Made = tuple[Callable[[int], Context], list[EraseMethod]]
"""How to make a new context with room for so many tokens, and what can erase from it."""


def _transformers(model: str, eraser: str | None, device: str | None, dtype: str | None, quiet: bool) -> Made:
    backbone, tokenizer = load(model, device, dtype, quiet=quiet)
    tool = KVEraser.from_pretrained(eraser, backbone) if eraser else default_eraser(backbone)
    return lambda _: ErasableContext(backbone, tokenizer, tool), [as_method(name) for name in methods()]


def _llama_cpp(model: str, eraser: str | None, device: str | None, dtype: str | None) -> Made:
    from kveraser.engines.llama_cpp import METHODS, LlamaCppContext, LlamaCppModel

    if device or dtype:
        raise OptionError("--device and --dtype are for transformers; llama.cpp computes as its GGUF file says")
    if model != DEFAULT_MODEL and not model.endswith(".gguf"):
        raise OptionError(f"llama.cpp loads GGUF files, and {model!r} is none; give a .gguf file")
    loaded = LlamaCppModel(None if model == DEFAULT_MODEL else Path(model))
    tool = loaded.find_eraser(eraser)
    return lambda length: LlamaCppContext(loaded, tool, length=length), [kind() for kind in METHODS]


def _as_json(
    name: str, question: str, erased: str, after: list[MethodResult], cached: list[MethodResult]
) -> dict[str, Any]:
    return {
        "story": name,
        "question": question,
        "erased": erased,
        "query_after": [result.as_dict() for result in after],
        "query_cached": [result.as_dict() for result in cached],
    }


def _latency_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("tokens behind the span", no_wrap=True)
    for suffix in SUFFIXES:
        table.add_column(str(suffix), justify="right")
    table.add_column("growth", justify="right")
    for name in dict.fromkeys(row["method"] for row in rows):
        times = [row["milliseconds"] for row in rows if row["method"] == name]
        table.add_row(name, *(f"{t:.0f}" for t in times), f"{times[-1] / times[0]:.1f}x")
    return table


def _verdict(told: list[dict[str, Any]]) -> None:
    """Say for each method in how many of the answers the erased value still is."""
    counts: dict[str, int] = {}
    total = 0
    for story in told:
        for protocol in ("query_after", "query_cached"):
            total += 1
            for result in story[protocol]:
                counts[result["method"]] = counts.get(result["method"], 0) + leaks(result["answer"], story["erased"])
    said = ", ".join(f"{name} {count}" for name, count in counts.items())
    stdout.print(f"\nAnswers with the erased value, of {total}: {said}")
