"""`kveraser demo`: four stories and a latency table, on a real model."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from kveraser.cli import options as opt
from kveraser.cli.common import load, print_json, progress_bar, reported, stdout
from kveraser.cli.tables import heat_line, results_table, top_readers
from kveraser.context import ErasableContext
from kveraser.demo.latency import SUFFIXES, measure_latency
from kveraser.demo.stories import stories
from kveraser.demo.tell import Told, tell_both
from kveraser.eraser import KVEraser, default_eraser
from kveraser.errors import OptionError
from kveraser.evaluation import PROTOCOLS, leaks
from kveraser.evaluation.compare import Context
from kveraser.evaluation.runner import DEFAULT_BUDGET
from kveraser.methods import EraseMethod, FullRecompute, Steering, methods

STORY_TOKENS, LATENCY_TOKENS = 2048, 5120
PAGES = 5
"""Behind what is erased: some 480 tokens, of which at most a seventh is recomputed."""


class Engine(StrEnum):
    """What computes."""

    TRANSFORMERS = "transformers"
    LLAMA_CPP = "llama-cpp"


def demo_command(
    model: opt.Model = opt.DEFAULT_MODEL,
    eraser: opt.Eraser = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    engine: Annotated[
        Engine, typer.Option(help="What computes; llama-cpp takes GGUF files only.")
    ] = Engine.TRANSFORMERS,
    latency: Annotated[bool, typer.Option(help="Also measure how the cost grows with the suffix.")] = True,
    as_json: opt.Json = False,
) -> None:
    """Erase spans from what a model has already read: four stories, every method, two ways to ask.

    "Asked after": the question comes after the erase. "Question was cached": the question had been read, with the span
    still there, when the span was erased; that is harder. KL is the distance to full recomputation, in nats per token
    of its answer; "run" is the number of tokens run through the model: the same for every method that recomputes some. "Left" is
    the receipt's own estimate: the share of the attention to the span that was not recomputed. An answer in red says what
    should be gone. The line of blocks shows who has read the span, from right behind it to the end. The embedded model computes
    in float32 where --dtype says nothing else.

    Example: kveraser demo --no-latency
    """
    with reported(as_json):
        started = time.perf_counter()
        if engine is Engine.LLAMA_CPP:
            new_context, every = _llama_cpp(model, eraser, device, dtype)
        else:
            new_context, every = _transformers(model, eraser, device, dtype, as_json)
        timed = [method for method in every if method.timed]
        told: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        with progress_bar() as bar:
            steps = len(stories()) * len(every) * len(PROTOCOLS)
            task = bar.add_task("stories", total=steps + latency * len(SUFFIXES) * len(timed))
            for story in stories(PAGES):
                found = tell_both(story, new_context(STORY_TOKENS), every, done=lambda _: bar.advance(task))
                told.append(_as_json(story.name, story.question, story.erased, found))
                if not as_json:
                    said = f"[bold]{story.name}[/]: {story.use}\nerased: [italic]{story.span.strip()}[/]\nasked: {story.question}"
                    stdout.print()
                    stdout.print(Panel(said, expand=False))
                    stdout.print(results_table(found.after, found.cached, story.erased))
                    if line := heat_line(found.read):
                        stdout.print(
                            f"who read it, of {found.behind} tokens behind it: [red]{line}[/]", highlight=False
                        )
                        stdout.print(
                            f"[dim]most of all: {escape(top_readers(found.words, found.read))}[/]", highlight=False
                        )
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
    # Rounding decides between two answers of a model as small as the embedded one, so that it differs from machine to machine.
    default = "fp32" if model == opt.DEFAULT_MODEL else None
    backbone, tokenizer = load(model, device, dtype or default, quiet=quiet)
    tool = KVEraser.from_pretrained(eraser, backbone) if eraser else default_eraser(backbone)
    return lambda _: ErasableContext(backbone, tokenizer, tool), [
        kind().with_budget(DEFAULT_BUDGET) for kind in methods().values() if kind.compared
    ]


def _llama_cpp(model: str, eraser: str | None, device: str | None, dtype: str | None) -> Made:
    from kveraser.engines.llama_cpp import METHODS, LlamaCppContext, LlamaCppModel

    if device or dtype:
        raise OptionError("--device and --dtype are for transformers; llama.cpp computes as its GGUF file says")
    if model != opt.DEFAULT_MODEL and not model.endswith(".gguf"):
        raise OptionError(f"llama.cpp loads GGUF files, and {model!r} is none; give a .gguf file")
    loaded = LlamaCppModel(None if model == opt.DEFAULT_MODEL else Path(model))
    tool = loaded.find_eraser(eraser) if eraser else loaded.default_eraser()
    return lambda length: LlamaCppContext(loaded, tool, length=length), [
        kind().with_budget(DEFAULT_BUDGET) for kind in METHODS
    ]


def _as_json(name: str, question: str, erased: str, told: Told) -> dict[str, Any]:
    return {
        "story": name,
        "question": question,
        "erased": erased,
        "tokens_behind": told.behind,
        "readers": [{"text": text, "read": read} for text, read in zip(told.words, told.read, strict=True)],
        "query_after": [result.as_dict() for result in told.after],
        "query_cached": [result.as_dict() for result in told.cached],
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
    """Every method over all answers: how often it says the erased value, how often what full recomputation says, how far off."""
    by_method: dict[str, list[tuple[bool, bool, float, int]]] = {}
    for story in told:
        for protocol in PROTOCOLS:
            exact = next(row["answer"] for row in story[protocol] if row["method"] == FullRecompute.name)
            for row in story[protocol]:
                leaked, same = leaks(row["answer"], story["erased"]), row["answer"] == exact
                seen = by_method.setdefault(row["method"].partition(":")[0], [])
                seen.append((leaked, same, row["kl"], row["tokens_recomputed"]))
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in ("over all answers", "say the erased value", "equal full recomputation's", "mean KL", "tokens run"):
        table.add_column(column, justify="left" if column == "over all answers" else "right")
    means: dict[str, tuple[float, ...]] = {}
    for name, rows in by_method.items():
        means[name] = leaked, same, kl, run = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
        count = len(rows)
        table.add_row(
            name, f"{leaked * count:.0f} of {count}", f"{same * count:.0f} of {count}", f"{kl:.3f}", f"{run:.0f}"
        )
    stdout.print()
    stdout.print(table)
    erasing = [name for name in means if methods()[name].removes and not methods()[name].exact]
    best = min(erasing, key=lambda name: means[name][2])
    stdout.print(f"Nearest to full recomputation, of those that do not recompute everything: [bold]{best}[/].")
    if Steering.name in means and FullRecompute.name in means:
        _, same, _, run = means[Steering.name]
        stdout.print(
            f"The default, [bold]{Steering.name}[/], answers as full recomputation does in {same:.0%} of the answers with "
            f"{run / means[FullRecompute.name][3]:.0%} of the tokens, and moves nothing: every position stays valid, and undo is cheap."
        )
