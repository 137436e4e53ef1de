"""Tables of the commands.

Knows: Rich and results. Does not know how results come about; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.table import Table
from rich.text import Text

from kveraser.evaluation import MethodResult, leaks
from kveraser.evaluation.report import format_interval, format_mean
from kveraser.evaluation.summary import DIFFERENCE, KL, METRICS, Row


def answer_text(answer: str, erased: str | None) -> Text:
    """An answer's first line, red when it says the erased value."""
    lines = [line for line in answer.strip().split("\n") if line.strip()]
    shown = lines[0] if lines else "(nothing)"
    return Text(shown, style="bold red" if erased and leaks(answer, erased) else "")


def method_name(result: MethodResult, *, options: bool = True) -> str:
    """The method's name, with its options and the one that `auto` chose."""
    name = result.method if options else result.method.partition(":")[0]
    return name if result.used == result.method else f"{name} ({result.used})"


_SHADES = " ▁▂▃▄▅▆▇█"


def heat_line(read: Sequence[float], width: int = 64) -> str:
    """How much each stretch of a text has read something, as a line of blocks; the highest one is the most of all."""
    if not read or max(read) <= 0:
        return ""
    edges = [round(index * len(read) / min(width, len(read))) for index in range(min(width, len(read)) + 1)]
    stretches = [max(read[start:end]) / max(read) for start, end in pairwise(edges)]
    return "".join(_SHADES[min(round(share * (len(_SHADES) - 1)), len(_SHADES) - 1)] for share in stretches)


def top_readers(words: Sequence[str], read: Sequence[float], count: int = 6) -> str:
    """The words that have read most, with their distance behind the span and their share of attention."""
    most = sorted(range(len(read)), key=lambda index: -read[index])[:count]
    return ", ".join(
        f"{words[index].strip() or repr(words[index])} (+{index + 1}, {read[index]:.0%})" for index in most
    )


def state_of(result: MethodResult) -> str:
    """Whether a cache is exact; where not, and where that is known, how much was left."""
    if result.used == "no-erase":
        return "as it was"
    if result.exact:
        return "exact"
    return "approx." if result.residual is None else f"approx., {result.residual:.0%} left"


def results_table(
    after: list[MethodResult], cached: list[MethodResult] | None = None, erased: str | None = None
) -> Table:
    """One row per method; with `cached`, the answers and distances of the harder protocol beside."""
    table = Table(box=None, padding=(0, 1), collapse_padding=True, pad_edge=False, header_style="bold")
    table.add_column("method", no_wrap=True)
    table.add_column("answer" if cached is None else "asked after the erase", overflow="fold", ratio=1)
    if cached is not None:
        table.add_column("question was cached", overflow="fold", ratio=1)
    table.add_column("cache", no_wrap=True)
    table.add_column("run", justify="right", no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    table.add_column("KL" if cached is None else "KL after/cached", justify="right", no_wrap=True)
    distinct = len({result.method.partition(":")[0] for result in after}) == len(after)
    for index, result in enumerate(after):
        other = cached[index] if cached is not None else None
        cells: list[str | Text] = [method_name(result, options=not distinct), answer_text(result.answer, erased)]
        if other is not None:
            cells.append(answer_text(other.answer, erased))
        cells += [state_of(result), str(result.tokens_recomputed), f"{result.milliseconds:.0f}"]
        cells.append(f"{result.kl:.3f}" if other is None else f"{result.kl:.3f}/{other.kl:.3f}")
        table.add_row(*cells)
    return table


def summary_table(rows: Sequence[Row]) -> Table:
    """One row per method with all metrics; intervals where methods are told apart by them (the files have them all)."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("method", no_wrap=True)
    for metric in METRICS:
        table.add_column(metric.title, justify="right")
    for row in rows:
        table.add_row(row.method, *(
            (format_interval if metric in (KL, DIFFERENCE) else format_mean)(row.values[metric.name], metric.digits)
            for metric in METRICS
        ))  # fmt: skip
    return table
