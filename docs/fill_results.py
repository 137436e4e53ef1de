"""Fill the tables of Markdown pages from the folder that `make results` writes.

A table, or a number within a sentence, stands between two marks, `<!-- results FOLDER TABLE [ARGUMENT] -->` and
`<!-- /results -->`; the text around it is written by hand. FOLDER is below the results folder (`A+B`: the rows of both, `*`: of
all), TABLE one of `TABLES` below. For tables the argument is a length in tokens; without it there is a table for every length.
`overview` is a row for every method, a pair of columns for every folder; `runs` a row for every folder and length, a column for every method;
`answers` a row for every method, columns for every length; `kl`, `em`, `f1`, `leak` and `count` are numbers for sentences: of a method,
and how many examples there are.

Usage: python docs/fill_results.py [--kept FOLDER]... RESULTS PAGE...
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kveraser.evaluation.erratum import as_compared
from kveraser.evaluation.report import (
    all_metrics,
    cells,
    columns_explained,
    format_mean,
    markdown_table,
    over_fewer,
    provenance_line,
)
from kveraser.evaluation.summary import ASKED, KL, METRICS, OVERALL, Row, reference_method, task_names

MARKED = re.compile(r"(<!-- results (\S+) (\S+)(?: (\S+))? -->).*?(<!-- /results -->)", re.DOTALL)
KEPT = "*Not made again in the last run of `make results`: its data was not given.*"
MISSING = "*Not made yet.*"
MEANS = ("kl", "kl_ratio", "agreement", "exact_match", "f1", "leaked", "leak_margin", "milliseconds")


def both(rows: Sequence[Row], task: str, length: int, method: str, metric: str, digits: int) -> str:
    """A metric in every protocol, `after / cached`."""
    found = [row for protocol in ASKED for row in cells(rows, task, length, protocol) if row.method == method]
    return " / ".join(format_mean(row.values[metric], digits) or "-" for row in found)


def methods(rows: Sequence[Row], length: int) -> list[str]:
    """The methods of a length."""
    return list(dict.fromkeys(row.method for row in rows if row.length == length))


def means(rows: Sequence[Row], length: int) -> str:
    """Every method in a row: the means over tasks, after / cached."""
    shown = [m for m in METRICS if m.name in MEANS and any(row.values[m.name] for row in rows)]
    body = [
        [f"`{name}`", *(both(rows, OVERALL, length, name, m.name, m.digits) for m in shown)]
        for name in methods(rows, length)
    ]
    counted = [row for row in rows if row.task == OVERALL and row.length == length]
    return markdown_table(["after / cached", *(metric.title for metric in shown)], body) + over_fewer(counted, shown)


def by_task(rows: Sequence[Row], length: int) -> str:
    """KL of every method in every task, after / cached."""
    tasks = [*task_names(rows), OVERALL]
    body = [
        [f"`{name}`", *(both(rows, task, length, name, KL.name, 3) for task in tasks)] for name in methods(rows, length)
    ]
    return markdown_table(["KL after / cached", *tasks], body)


def full(rows: Sequence[Row], length: int) -> str:
    """All metrics with their intervals, a table for every protocol."""
    tables = [(asked, cells(rows, OVERALL, length, protocol)) for protocol, asked in ASKED.items()]
    return "\n\n".join(f"{asked[0].upper()}{asked[1:]}:\n\n{all_metrics(found)}" for asked, found in tables if found)


def by_length(rows: Sequence[Row]) -> str:
    """KL and, where there are any, milliseconds of every method at every length, after / cached."""
    lengths = sorted({row.length for row in rows})
    names = list(dict.fromkeys(name for length in lengths for name in methods(rows, length)))
    shown = [(KL.name, "KL", 3)]
    if any(row.values["milliseconds"] for row in rows):
        shown.append(("milliseconds", "ms", 0))
    body = [
        [f"`{name}`", *(both(rows, OVERALL, n, name, metric, digits) for metric, _, digits in shown for n in lengths)]
        for name in names
    ]
    return markdown_table(["after / cached", *(f"{title} at {n}" for _, title, _ in shown for n in lengths)], body)


def latency(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of an erase as the suffix grows, from `kveraser demo --json`."""
    suffixes = sorted({row["suffix"] for row in rows})
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        times = [row["milliseconds"] for row in rows if row["method"] == name]
        body.append([f"`{name}`", *(f"{time:.0f}" for time in times), f"{times[-1] / times[0]:.1f}x"])
    return markdown_table(["tokens behind the span", *map(str, suffixes), "growth"], body)


def short_name(label: str) -> str:
    """A method where all that recompute some tokens recompute the same number: without it, unless it is none."""
    return "kveraser, nothing recomputed" if label == "kveraser:repair=0" else label.partition(":")[0]


def overview(folders: dict[str, list[Row]]) -> str:
    """KL of every method on every backbone, after / cached, at its only length; methods by name, at their budget there."""
    columns = {name: rows for name, rows in folders.items() if rows}
    shown: dict[str, list[str]] = {}
    for place, rows in enumerate(columns.values()):
        length = max(row.length for row in rows)
        for label in methods(rows, length):
            name = short_name(label)
            shown.setdefault(name, [""] * len(columns))[place] = both(rows, OVERALL, length, label, KL.name, 4)
    body = [[f"`{name}`" if "," not in name else name, *cells_] for name, cells_ in shown.items()]
    return markdown_table(["KL after / cached", *columns], body)


def runs(documents: dict[str, dict[str, Any]], folders: dict[str, list[Row]]) -> str:
    """KL of every method, after / cached, at every length of every folder; of several budgets for a method, that of the reference."""
    lines: list[tuple[list[str], dict[str, str]]] = []
    for model, length, folder in sorted(
        (documents[folder]["options"]["model"], length, folder)
        for folder, rows in folders.items()
        for length in {row.length for row in rows}
    ):
        rows, options = [row for row in folders[folder] if row.length == length], documents[folder]["options"]
        reference = reference_method(methods(rows, length))
        budget = as_compared(reference).recomputes if reference else None
        labels: dict[str, str] = {}
        for label in methods(rows, length):
            if short_name(label) not in labels or as_compared(label).recomputes == budget:
                labels[short_name(label)] = label
        tasks = task_names(rows)
        asked = (f"{len(tasks)} tasks" if len(tasks) > 1 else tasks[0]) + (", chat" if options.get("chat") else "")
        if (documents[folder].get("eraser") or {}).get("kind") == "trained":
            asked += ", trained eraser"
        about = [f"[{folder}](results/{folder}/results.md)", model, options["dtype"], asked, str(length), count(rows)]
        lines.append((about, {name: both(rows, OVERALL, length, label, KL.name, 4) for name, label in labels.items()}))
    names = list(dict.fromkeys(name for _, found in lines for name in found))
    body = [[*about, *(found.get(name, "") for name in names)] for about, found in lines]
    return markdown_table(["run", "backbone", "type", "asked", "tokens", "examples", *names], body)


def answers(rows: Sequence[Row]) -> str:
    """Exact match and leaks of every method at every length, after / cached."""
    lengths = sorted({row.length for row in rows})
    shown = [(metric, title, n) for metric, title in (("exact_match", "EM"), ("leaked", "leak")) for n in lengths]
    names = list(dict.fromkeys(name for length in lengths for name in methods(rows, length)))
    body = [[f"`{name}`", *(both(rows, OVERALL, n, name, metric, 2) for metric, _, n in shown)] for name in names]
    counted = ["examples", *(answered([row for row in rows if row.length == n], metric) for metric, _, n in shown)]
    return markdown_table(["after / cached", *(f"{title} at {n}" for _, title, n in shown)], [*body, counted])


def number(rows: Sequence[Row], name: str, method: str) -> str:
    """A metric of one method over the tasks, after / cached, at the only length; nothing where it is not there."""
    metric, digits = NUMBERS[name]
    found = both(rows, OVERALL, max((row.length for row in rows), default=0), method, metric, digits)
    return "" if "-" in found.split(" / ") else found


def count(rows: Sequence[Row]) -> str:
    """How many examples every method has been through in each protocol; nothing where there are none."""
    return str(max((row.examples for row in rows if row.task == OVERALL), default=""))


def answered(rows: Sequence[Row], metric: str) -> str:
    """How many of them a metric is over; where the results do not say, which."""
    values = [value for row in rows if row.task == OVERALL and (value := row.values[metric])]
    if known := [value.count for value in values if value.count is not None]:
        return str(max(known))
    return f"those of {count(rows)} with a gold answer" if metric == "exact_match" else count(rows)


def same_answers(document: dict[str, Any], method: str) -> str:
    """How many answers of a method in the demo equal full recomputation's, `7 of 8`; nothing where there are none."""
    found = [
        row["answer"] == next(other["answer"] for other in story[protocol] if other["method"] == "full-recompute")
        for story in document["stories"]
        for protocol in ASKED
        for row in story[protocol]
        if row["method"].partition(":")[0] == method
    ]
    return f"{sum(found)} of {len(found)}" if found else ""


PER_LENGTH: dict[str, Callable[[Sequence[Row], int], str]] = {"means": means, "tasks": by_task, "full": full}
NUMBERS = {"kl": (KL.name, 4), "em": ("exact_match", 2), "f1": ("f1", 2), "leak": ("leaked", 2)}
IN_SENTENCES = (*NUMBERS, "count", "same")
TABLES = (*PER_LENGTH, "made", "lengths", "columns", "latency", "overview", "runs", "answers", *IN_SENTENCES)


def table(documents: dict[str, dict[str, Any]], name: str, argument: str | None, kept: bool) -> str:
    """One table, or one number, of the `results.json` of some folders."""
    first = next(iter(documents.values()))
    if name == "latency":
        return latency(first["latency"])
    if name == "same":
        return same_answers(first, argument or "kveraser")
    if name == "made":
        lines = [provenance_line(document) for document in documents.values()]
        return "\n\n".join([*lines, *([KEPT] if kept else [])])
    if name == "columns":
        return columns_explained()
    by_folder = {
        folder: [Row.from_dict(row) for row in document["rows"]]
        for folder, document in documents.items()
        if "rows" in document
    }
    rows = [row for found in by_folder.values() for row in found]
    if name == "overview":
        return overview({documents[folder]["options"]["model"]: found for folder, found in by_folder.items()})
    if name == "runs":
        return runs(documents, by_folder)
    if name == "lengths":
        return by_length(rows)
    if name == "answers":
        return answers(rows)
    if name in NUMBERS:
        return number(rows, name, argument or "kveraser")
    if name == "count":
        return count(rows)
    if name not in PER_LENGTH:
        raise SystemExit(f"there is no table {name!r}; there are: {', '.join(TABLES)}")
    there = sorted({row.length for row in rows})
    if argument is not None and int(argument) not in there:
        raise SystemExit(f"a page wants {name} at {argument} tokens, the results have {there}")
    if argument is not None:
        return PER_LENGTH[name](rows, int(argument))
    return "\n\n".join(f"**Contexts of about {n} tokens**\n\n{PER_LENGTH[name](rows, n)}" for n in there)


def fill(page: str, results: Path, kept: Sequence[str] = ()) -> str:
    """A page with its tables and numbers made anew; those of folders without results say so."""

    def replaced(mark: re.Match[str]) -> str:
        begin, folders, name, argument, end = mark.groups()
        files = [file for folder in folders.split("+") for file in sorted(results.glob(f"{folder}/results.json"))]
        documents = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
        content = table(documents, name, argument, folders in kept) if documents else MISSING
        if not content:
            raise SystemExit(
                f"a page wants {' '.join(filter(None, (name, argument)))} of {folders}, which has no such number"
            )
        return f"{begin}{content}{end}" if name in IN_SENTENCES else f"{begin}\n{content}\n{end}"

    return MARKED.sub(replaced, page)


def main() -> None:
    """Fill the pages named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", action="append", default=[], help="folder that was not made again")
    parser.add_argument("results", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    given = parser.parse_args()
    for page in given.pages:
        page.write_text(fill(page.read_text(encoding="utf-8"), given.results, given.kept), encoding="utf-8")


if __name__ == "__main__":
    main()
