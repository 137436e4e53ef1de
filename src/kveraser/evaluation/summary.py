"""From records to the numbers of the tables: means over examples with intervals, and comparisons between methods.

Knows: records, statistics. Does not know how anything looks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from kveraser.evaluation.erratum import Erratum, as_compared
from kveraser.evaluation.record import Record
from kveraser.evaluation.statistics import Interval, Values, group_mean, interval, of_proportion, resampled_means
from kveraser.methods import DeleteAndShift, Steering

OVERALL = "mean over tasks"
"""Stands for the task in rows over all tasks, each of which counts the same."""
ASKED = {"query_after": "question asked after the erase", "query_cached": "question in the cache when erasing"}
"""The protocols in words, in the order of the tables."""


@dataclass(frozen=True)
class Metric:
    """A column: `name` in records and JSON, `title` in tables, the digits shown, what it means, and whether it is a share of examples."""

    name: str
    title: str
    digits: int
    meaning: str
    proportion: bool = False


KL = Metric("kl", "KL", 4, "KL(recompute || method), nats per token of full recomputation's answer")
RATIO = Metric("kl_ratio", "KL ratio", 2, "mean KL over that of delete-and-shift")
DIFFERENCE = Metric(
    "kl_difference",
    "kveraser minus it",
    4,
    "KL of kveraser minus that of this method, paired by example; at the same number of recomputed tokens where both say one",
)
METRICS = (
    KL,
    RATIO,
    DIFFERENCE,
    Metric("agreement", "top-1", 2, "share of these tokens that are the most likely one by full recomputation, too"),
    Metric("exact_match", "EM", 2, "exact match of the answer, of the examples that have a gold answer (the context still says it)", True),
    Metric("f1", "F1", 2, "word overlap of the answer, of the same examples"),
    Metric("leaked", "leak", 2, "share of answers that say the erased one", True),
    Metric("leak_margin", "margin", 2, "log-probability of the erased answer minus that by full recomputation, per token"),
    Metric("recalled", "quote", 2, "share of requests for what was taken back that are answered with the erased answer", True),
    Metric("residual", "residual", 2, "share of the attention to the span that was not recomputed, as the receipt says"),
    Metric("tokens_recomputed", "run", 0, "tokens run through the model by the erase (of erratum: of its line)"),
    Metric("milliseconds", "ms", 0, "time of the erase (of erratum: of reading its line)"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One method on the examples of a task (or `OVERALL`), length and protocol.

    Attributes:
        examples: how many; only those that every method has been through.
        values: metric -> mean and interval; None where it has no meaning.
    """

    task: str
    length: int
    protocol: str
    method: str
    examples: int
    values: dict[str, Interval | None]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the metrics beside the rest."""
        flat = asdict(self)
        values = flat.pop("values")
        return {**flat, **values}

    @classmethod
    def from_dict(cls, flat: dict[str, Any]) -> Row:
        """The row that `as_dict` gave."""
        values = {m.name: Interval(**flat[m.name]) if flat.get(m.name) else None for m in METRICS}
        return cls(flat["task"], flat["length"], flat["protocol"], flat["method"], flat["examples"], values)


def task_names(rows: Iterable[Row]) -> list[str]:
    """The tasks in the rows."""
    return [task for task in dict.fromkeys(row.task for row in rows) if task != OVERALL]


Example = dict[str, Record]
"""One example in one protocol: method -> record."""


def summarise(records: Iterable[Record], seed: int = 0) -> list[Row]:
    """Rows for every length, protocol, task (and over all tasks) and method.

    Args:
        seed: of the bootstrap.
    """
    records = list(records)
    methods = list(dict.fromkeys(record.method for record in records))
    examples: dict[tuple[int, str], dict[str, dict[int, Example]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(dict))
    )
    for record in records:
        examples[record.length, record.protocol][record.task][record.index][record.method] = record
    rows = []
    for (length, protocol), tasks in sorted(examples.items()):
        complete = {task: [e for e in by_index.values() if len(e) == len(methods)] for task, by_index in tasks.items()}
        groups = {task: found for task, found in complete.items() if found}
        if not groups:
            continue
        for task, chosen in ((OVERALL, list(groups.values())), *((task, [found]) for task, found in groups.items())):
            count = sum(map(len, chosen))
            for method, values in zip(methods, _columns(chosen, methods, seed), strict=True):
                rows.append(Row(task, length, protocol, method, count, values))
    return rows


def reference_method(methods: Sequence[str], other: str | None = None) -> str | None:
    """The method that another one is compared with; None without one.

    It is `kveraser` at the same number of recomputed tokens, else as it is, else the variant that recomputes most.
    """
    steering = {name: method for name in methods if isinstance(method := as_compared(name), Steering)}
    budget = as_compared(other).recomputes if other is not None and other not in steering else None
    same = [name for name, method in steering.items() if budget is not None and method.repair == budget]
    if same or Steering.name in steering:
        return next(iter(same), Steering.name)
    return max(steering, key=lambda name: steering[name].repair or 0, default=None)


def _columns(groups: list[list[Example]], methods: list[str], seed: int) -> list[dict[str, Interval | None]]:
    """The metrics of each method."""
    columns: list[dict[str, Interval | None]] = [dict.fromkeys(m.name for m in METRICS) for _ in methods]
    for metric in METRICS:
        if metric in (RATIO, DIFFERENCE):
            continue
        having = _knowing(groups, methods, metric)
        tables = [table for group in groups if having and len(table := _table(group, having, metric))]
        if not tables:
            continue
        means, draws, count = group_mean(tables), resampled_means(tables, seed), sum(map(len, tables))
        for index, method in enumerate(having):
            found = interval(means[index], draws[:, index], count)
            columns[methods.index(method)][metric.name] = (
                of_proportion(found, [table[:, index] for table in tables]) if found and metric.proportion else found
            )
        if metric is KL:
            _compare(columns, methods, means, draws, count)
    return columns


def _compare(
    columns: list[dict[str, Interval | None]], methods: list[str], means: Values, draws: Values, count: int
) -> None:
    """Enter the ratio to delete-and-shift, and the difference of the reference to every other approximate method."""
    if DeleteAndShift.name in methods:
        base = methods.index(DeleteAndShift.name)
        with np.errstate(divide="ignore", invalid="ignore"):
            for index, column in enumerate(columns):
                column[RATIO.name] = interval(means[index] / means[base], draws[:, index] / draws[:, base], count)
    for index, (name, column) in enumerate(zip(methods, columns, strict=True)):
        method, reference = as_compared(name), reference_method(methods, name)
        takes_back = method.removes or isinstance(method, Erratum)
        if reference is not None and takes_back and not method.exact and name != reference:
            own = methods.index(reference)
            column[DIFFERENCE.name] = interval(means[own] - means[index], draws[:, own] - draws[:, index], count)


def _knowing(groups: list[list[Example]], methods: list[str], metric: Metric) -> list[str]:
    """The methods that have a metric: all must have it for an example to count, so who seldom knows it has none of it."""
    known = [{m for m in methods if _value(example, m, metric) is not None} for group in groups for example in group]
    count = sum(map(bool, known))
    return [method for method in methods if count and 2 * sum(method in found for found in known) >= count]


def _table(group: list[Example], methods: list[str], metric: Metric) -> Values:
    """`(examples, methods)`, of the examples for which the metric has a meaning."""
    rows = [[_value(example, method, metric) for method in methods] for example in group]
    return np.array([row for row in rows if None not in row], dtype=np.float64)


def _value(example: Example, method: str, metric: Metric) -> float | None:
    found: float | None = getattr(example[method], metric.name)
    return found
