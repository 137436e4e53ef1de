"""The results of an evaluation as files: JSON, Markdown tables, plots.

Knows: rows, Markdown. Does not know how the numbers come about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kveraser.evaluation.record import RESULTS, Record, write_json
from kveraser.evaluation.statistics import Interval
from kveraser.evaluation.summary import ASKED, METRICS, OVERALL, Metric, Row, summarise, task_names
from kveraser.files import write_atomically

MARKDOWN = "results.md"


def results(header: dict[str, Any], records: Sequence[Record], complete: bool) -> tuple[dict[str, Any], list[Row]]:
    """The content of `results.json`, and its rows."""
    rows = summarise(records, header["options"]["seed"])
    made, commits = header["environment"], list(dict.fromkeys(record.commit for record in records if record.commit))
    if commits and commits != [made["commit"]]:
        made = {**made, "commits": commits}
    return {**header, "environment": made, "complete": complete, "rows": [row.as_dict() for row in rows]}, rows


def write_report(folder: Path, header: dict[str, Any], records: Sequence[Record], complete: bool) -> None:
    """Write `results.json`, `results.md` and the plots into a folder, each whole or not at all."""
    document, rows = results(header, records, complete)
    write_json(folder / RESULTS, document)
    plots: list[str] = []
    if rows:
        from kveraser.evaluation.plots import draw_plots  # matplotlib is loaded for plots only

        for name, picture in draw_plots(rows, records).items():
            write_atomically(folder / name, picture)
            plots.append(name)
    write_atomically(folder / MARKDOWN, _page(document, rows, plots).encode())


def format_mean(value: Interval | None, digits: int) -> str:
    """A mean; nothing where there is none."""
    return "" if value is None else f"{value.mean:z.{digits}f}"


def format_interval(value: Interval | None, digits: int) -> str:
    """A mean and its interval, the latter only where it has a width that shows."""
    if value is None:
        return ""
    mean, low, high = (f"{number:z.{digits}f}" for number in (value.mean, value.low, value.high))
    return mean if low == high else f"{mean} [{low}, {high}]"


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def cells(rows: Sequence[Row], task: str, length: int, protocol: str) -> list[Row]:
    """The rows of one table, a method each."""
    return [row for row in rows if (row.task, row.length, row.protocol) == (task, length, protocol)]


def tables(rows: Sequence[Row], tasks: Sequence[str]) -> list[tuple[str, int, str, list[Row]]]:
    """Every table of the given tasks: task, length, protocol and rows."""
    lengths = sorted({row.length for row in rows})
    found = [(t, n, p, cells(rows, t, n, p)) for t in tasks for n in lengths for p in ASKED]
    return [table for table in found if table[-1]]


def all_metrics(rows: Sequence[Row]) -> str:
    """One table with every metric that any of the rows has, its interval, and how many examples it is over."""
    shown = [metric for metric in METRICS if any(row.values[metric.name] for row in rows)]
    head = ["method", *(metric.title for metric in shown)]
    body = [[f"`{row.method}`", *(format_interval(row.values[m.name], m.digits) for m in shown)] for row in rows]
    return markdown_table(head, body) + over_fewer(rows, shown)


def over_fewer(rows: Sequence[Row], metrics: Sequence[Metric]) -> str:
    """A paragraph below a table: which of its columns are over fewer examples than its rows; nothing where none is, or it is not known."""
    titles: dict[tuple[int, int], dict[str, None]] = {}
    for metric in metrics:
        for row in rows:
            value = row.values[metric.name]
            if value and value.count is not None and value.count != row.examples:
                titles.setdefault((value.count, row.examples), {})[metric.title] = None
    return "".join(
        f"\n\n{', '.join(found)}: over {count} of the {of} examples." for (count, of), found in titles.items()
    )


def columns_explained() -> str:
    """What the columns mean."""
    return "\n".join(f"- **{metric.title}**: {metric.meaning}" for metric in METRICS)


def _page(document: dict[str, Any], rows: Sequence[Row], plots: Sequence[str]) -> str:
    parts = ["# Erasing methods on held-out examples", provenance_line(document)]
    if not document["complete"]:
        parts.append("**The run is not finished**: these are the examples that every method has been through.")
    for task, length, protocol, chosen in tables(rows, [OVERALL, *task_names(rows)]):
        parts.append(f"## {task}, contexts of about {length} tokens, {ASKED[protocol]}")
        parts.append(
            f"{chosen[0].examples} examples; in brackets: 95 % intervals, by bootstrap; where all answers are so or none is, the exact bound."
        )
        parts.append(all_metrics(chosen))
    parts += ["## Columns", columns_explained()]
    parts += [f"![{name}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"


def provenance_line(document: dict[str, Any]) -> str:
    """In one paragraph: model, machine, versions, eraser, seed, and how much of it there is where it is not finished."""
    options, made, eraser = document["options"], document["environment"], document["eraser"]
    if eraser is None:
        about = "no eraser"
    elif eraser.get("kind") == "neutral":
        about = "the neutral eraser"
    else:
        repair = "by length" if eraser["repair"] is None else eraser["repair"]
        facts = f"rank {eraser['rank']}, window {eraser['window']}, repair {repair}"
        about = f"eraser {eraser['sha256'][:12]} ({facts})"
    through: dict[int, int] = {}
    for row in document["rows"]:
        if row["task"] == OVERALL:
            through[row["length"]] = max(through.get(row["length"], 0), row["examples"])
    begun = "" if document["complete"] else f" wanted, {sum(through.values())} in all there (not finished)"
    commits = made.get("commits", [made["commit"]] if made["commit"] else [])
    return (
        f"{options['model']} in {options['dtype']} on {options['device']} ({made['processor']}, {made['threads']} threads), "
        f"{about}; {options['limit']} examples per task and length{begun}{', in chat form' if options.get('chat') else ''}, seed {options['seed']}; kveraser {made['kveraser']}"
        f"{' at ' + ' and '.join(commits) if commits else ''}, torch {made['torch']}, transformers {made['transformers']}, "
        f"peft {made['peft']}."
    )
