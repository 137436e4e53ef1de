"""What the benchmarks share: caches of any length, interleaved timing, peak memory, files.

Ratios within one run are what counts: on a busy machine milliseconds are worth little. All cases of a group take turns, so
that what disturbs one disturbs all; the median is reported.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers.cache_utils import Cache, DynamicCache

from kveraser import __version__
from kveraser.cache import growable_cache
from kveraser.evaluation.provenance import commit, environment, placement
from kveraser.evaluation.report import markdown_table
from kveraser.evaluation.runner import DEFAULT_BUDGET
from kveraser.methods import EraseMethod, as_method
from kveraser.model.view import decoder, finish, kv_shape, model_device, model_dtype, text_config

Result = TypeVar("Result")


def at_one_budget(name: str) -> EraseMethod:
    """The method of a name, which recomputes as many tokens as all others where the name does not say how many."""
    method = as_method(name)
    return method if ":" in name else method.with_budget(DEFAULT_BUDGET)


def wait(model: nn.Module) -> None:
    """Let the device finish."""
    finish(model_device(model))


def random_cache(model: nn.Module, tokens: int, *, growable: bool = True, seed: int = 0) -> Cache:
    """A cache with random states of the model's shape: for time and memory, a context's content does not matter."""
    (layers, heads, head_dim), device = kv_shape(model), model_device(model)
    cache = growable_cache() if growable else DynamicCache()
    generator = torch.Generator().manual_seed(seed)
    for index in range(layers):
        pair = torch.randn(2, 1, heads, tokens, head_dim, generator=generator, dtype=torch.float32)
        keys, values = pair.to(device, model_dtype(model))
        cache.update(keys, values, index)
    return cache


def random_ids(model: nn.Module, tokens: int, seed: int = 0) -> torch.Tensor:
    """`(1, tokens)` ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, text_config(model).vocab_size, (1, tokens), generator=generator).to(model_device(model))


@torch.no_grad()
def plain_forward(model: nn.Module, ids: torch.Tensor) -> None:
    """The floor of every erase: the span's tokens once through the model, on an empty cache."""
    decoder(model)(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)


def interleaved(
    model: nn.Module, cases: Mapping[Any, Callable[[], Any]], repeats: int, title: str, warm_up: int = 1
) -> dict[Any, list[float]]:
    """Seconds of every case, which take turns."""
    seconds: dict[Any, list[float]] = {name: [] for name in cases}
    for turn in track(range(-warm_up, repeats), title, console=Console(stderr=True), transient=True):
        for name, run in cases.items():
            wait(model)
            started = time.perf_counter()
            own = run()  # a case that undoes its work says itself how long the work took
            wait(model)
            taken = own if isinstance(own, float) else time.perf_counter() - started
            if turn >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """The median of one case's seconds over that of another."""
    return statistics.median(slow) / statistics.median(fast)


def peak_bytes(model: nn.Module, run: Callable[[], Result]) -> tuple[int, Result]:
    """Bytes allocated at most at any time during a call, beyond what was there before; and what the call returned."""
    if model_device(model).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    now = peak = 0
    changes = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, result


def report(
    name: str,
    model: nn.Module,
    rows: Sequence[Mapping[str, Any]],
    table: Table,
    figure: Figure | None,
    output: Path | None,
    as_json: bool,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Print a table, or JSON; write `NAME.json`, `NAME.md` and `NAME.png` where a folder is given.

    Args:
        facts: what else the document has, such as the model's name where it is not the embedded one.
    """
    document = {"benchmark": name, **environment(model), **placement(model), **(facts or {}), "rows": list(rows)}
    report_table(name, document, table, output, as_json)
    if output is not None and figure is not None:
        FigureCanvasAgg(figure).print_png(output / f"{name}.png")


def table_of(labels: Sequence[str], numbers: Sequence[str], title: str | None = None) -> Table:
    """An empty table: columns of words, then columns of numbers."""
    table = Table(*labels, title=title)
    for number in numbers:
        table.add_column(number, justify="right")
    return table


def report_table(
    name: str, document: Mapping[str, Any], table: Table, output: Path | None, as_json: bool = False
) -> None:
    """Print a table, or what it is of as JSON; write both where a folder is given."""
    if as_json:
        print(json.dumps(document, indent=2))
    else:
        here = Console()
        Console(width=here.width if here.is_terminal else 140).print(table)
    write_json(name, document, output)
    if output is not None:
        (output / f"{name}.md").write_text(_markdown(table) + "\n", encoding="utf-8")


def write_json(name: str, document: Mapping[str, Any], output: Path | None) -> None:
    """Write `NAME.json` where a folder is given."""
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def engine_environment(**facts: Any) -> dict[str, Any]:
    """What a benchmark of another engine was made with: the engine's own facts, then machine and versions."""
    return {
        **facts,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "kveraser": __version__,
        "commit": commit(),
    }


def _markdown(table: Table) -> str:
    """A table as Markdown."""
    body = zip(*(column.cells for column in table.columns), strict=True)
    return markdown_table([str(column.header) for column in table.columns], [list(map(str, row)) for row in body])
