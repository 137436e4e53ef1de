"""Fill the tables of Markdown pages from the folder that `make results` writes.

A table stands between two marks, `<!-- results FOLDER TABLE [LENGTH] -->` and `<!-- /results -->`; the text around it is
written by hand. FOLDER is below the results folder, TABLE one of `TABLES` below; without LENGTH (tokens) there is a table
for every length.

Usage: python docs/fill_results.py [--kept FOLDER]... RESULTS PAGE...
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kveraser.evaluation.report import (
    all_metrics,
    cells,
    columns_explained,
    format_mean,
    markdown_table,
    provenance_line,
)
from kveraser.evaluation.summary import ASKED, KL, METRICS, OVERALL, Row, task_names

MARKED = re.compile(r"(<!-- results (\S+) (\S+)(?: (\d+))? -->\n).*?(<!-- /results -->)", re.DOTALL)
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
    shown = [metric for metric in METRICS if metric.name in MEANS]
    body = [
        [f"`{name}`", *(both(rows, OVERALL, length, name, m.name, min(m.digits, 3)) for m in shown)]
        for name in methods(rows, length)
    ]
    return markdown_table(["after / cached", *(metric.title for metric in shown)], body)


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
    """KL and milliseconds of every method at every length, after / cached."""
    lengths = sorted({row.length for row in rows})
    names = list(dict.fromkeys(name for length in lengths for name in methods(rows, length)))
    body = [
        [f"`{name}`", *(both(rows, OVERALL, n, name, metric, digits) for metric, digits in (("kl", 3), ("milliseconds", 0)) for n in lengths)]
        for name in names
    ]  # fmt: skip
    return markdown_table(["after / cached", *(f"KL at {n}" for n in lengths), *(f"ms at {n}" for n in lengths)], body)


def latency(rows: Sequence[dict[str, Any]]) -> str:
    """Milliseconds of an erase as the suffix grows, from `kveraser demo --json`."""
    suffixes = sorted({row["suffix"] for row in rows})
    body = []
    for name in dict.fromkeys(row["method"] for row in rows):
        times = [row["milliseconds"] for row in rows if row["method"] == name]
        body.append([f"`{name}`", *(f"{time:.0f}" for time in times), f"{times[-1] / times[0]:.1f}x"])
    return markdown_table(["tokens behind the span", *map(str, suffixes), "growth"], body)


PER_LENGTH: dict[str, Callable[[Sequence[Row], int], str]] = {"means": means, "tasks": by_task, "full": full}
TABLES = (*PER_LENGTH, "made", "lengths", "columns", "latency")


def table(document: dict[str, Any], name: str, length: int | None, kept: bool) -> str:
    """One table of a folder's `results.json`."""
    if name == "latency":
        return latency(document["latency"])
    if name == "made":
        return provenance_line(document) + (f"\n\n{KEPT}" if kept else "")
    if name == "columns":
        return columns_explained()
    rows = [Row.from_dict(row) for row in document["rows"]]
    if name == "lengths":
        return by_length(rows)
    if name not in PER_LENGTH:
        raise SystemExit(f"there is no table {name!r}; there are: {', '.join(TABLES)}")
    there = sorted({row.length for row in rows})
    if length is not None and length not in there:
        raise SystemExit(f"a page wants {name} at {length} tokens, the results have {there}")
    if length is not None:
        return PER_LENGTH[name](rows, length)
    return "\n\n".join(f"**Contexts of about {n} tokens**\n\n{PER_LENGTH[name](rows, n)}" for n in there)


def fill(page: str, results: Path, kept: Sequence[str] = ()) -> str:
    """A page with its tables made anew; those of a folder without results say so."""

    def replaced(mark: re.Match[str]) -> str:
        begin, folder, name, length, end = mark.groups()
        file = results / folder / "results.json"
        content = MISSING
        if file.exists():
            document = json.loads(file.read_text(encoding="utf-8"))
            content = table(document, name, int(length) if length else None, folder in kept)
        return f"{begin}{content}\n{end}"

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
