"""Tables of the commands. Knows: Rich and results. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

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


def method_name(result: MethodResult) -> str:
    """The method's name, with the one that `auto` chose."""
    return result.method if result.used == result.method else f"{result.method} ({result.used})"


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
    for index, result in enumerate(after):
        other = cached[index] if cached is not None else None
        cells: list[str | Text] = [method_name(result), answer_text(result.answer, erased)]
        if other is not None:
            cells.append(answer_text(other.answer, erased))
        state = "as it was" if result.used == "no-erase" else "exact" if result.exact else "approx."
        cells += [state, str(result.tokens_recomputed), f"{result.milliseconds:.0f}"]
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
