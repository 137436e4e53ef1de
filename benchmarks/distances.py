"""What an engine's distances to its own full recomputation come to: a row for each length, protocol and method.

    python benchmarks/distances.py docs/bench

The benchmarks of engines keep what each context gave while they run (`ENGINE_quality_MODEL.json`), so that one which was cut off goes on. Of
such a record `..._summary.json` and `..._summary.md` are made here, by the benchmarks and by the command, which does so for all records of
a folder. Knows records, not engines.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from measuring import report_table, table_of, write_json

from kveraser.evaluation.runner import Drawn
from kveraser.methods.choosing import CHOSEN

Record = Mapping[str, Any]
"""`environment`, and `rows`, one for each context and protocol: `task`, `length`, `index`, `protocol`, `tokens`, and `methods` with `kl` and `ms`
of each; in some engines also `same`, `leak` and `recomputed`."""
ASKED = {"query_after": "after", "query_cached": "cached"}


def earlier(output: Path | None, name: str) -> list[dict[str, Any]]:
    """The rows of an earlier run, to go on with; one that chose readers otherwise is not gone on with."""
    if output is None or not (output / f"{name}.json").exists():
        return []
    file = output / f"{name}.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    if (before := document.get("readers")) != CHOSEN:
        raise SystemExit(
            f"{file} was measured with readers chosen otherwise ({before}, now {CHOSEN}); give another --output, or delete it"
        )
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def of_context(rows: Sequence[dict[str, Any]], drawn: Drawn, protocol: str) -> dict[str, Any]:
    """The row of a context and protocol, or a new one; what its `methods` lacks is still to be measured."""
    key = {"task": drawn.task, "length": drawn.length, "index": drawn.index, "protocol": protocol}
    return next((row for row in rows if key.items() <= row.items()), {**key, "methods": {}})


def record(name: str, rows: Sequence[Record], environment: Mapping[str, Any], output: Path | None) -> None:
    """Keep what the contexts have given so far."""
    write_json(name, {"rows": list(rows), "environment": dict(environment), "readers": CHOSEN}, output)


def summary(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each length, protocol and method, these in the order in which the record has them.

    `kl` and `median` in nats per token, `ms` a median, `same` and `leaks` counts of answers, None where the engine does not say.
    """
    found = []
    for length, protocol in itertools.product(sorted({row["length"] for row in rows}), ASKED):
        contexts = [row for row in rows if (row["length"], row["protocol"]) == (length, protocol)]
        for method in dict.fromkeys(method for row in contexts for method in row["methods"]):
            tried = [row["methods"][method] for row in contexts if method in row["methods"]]
            kls = [one["kl"] for one in tried]
            found.append({
                "length": length, "protocol": ASKED[protocol], "method": method, "contexts": len(tried),
                "kl": statistics.fmean(kls), "median": statistics.median(kls), "same": _sum(tried, "same"), "leaks": _sum(tried, "leak"),
                "ms": statistics.median(one["ms"] for one in tried),
                "recomputed": statistics.fmean(one["recomputed"] for one in tried) if _says(tried, "recomputed") else None,
            })  # fmt: skip
    return found


def _says(tried: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(name in one for one in tried)


def _sum(tried: Sequence[Mapping[str, Any]], name: str) -> int | None:
    return sum(one[name] for one in tried) if _says(tried, name) else None


def summarise(name: str, document: Record, output: Path | None) -> None:
    """Print the summary of a record; write it where a folder is given."""
    rows = summary(document["rows"])
    table = table_of(
        ["method", "asked"],
        ("length", "contexts", "mean KL", "median KL", "answers the same", "leaks", "ms", "recomputed"),
    )
    for row in rows:
        counts = ("" if row[key] is None else f"{row[key]} of {row['contexts']}" for key in ("same", "leaks"))
        recomputed = "" if row["recomputed"] is None else f"{row['recomputed']:.0f}"
        table.add_row(f"`{row['method']}`", row["protocol"], str(row["length"]), str(row["contexts"]), f"{row['kl']:.4f}", f"{row['median']:.4f}", *counts,
                      f"{row['ms']:.0f}", recomputed)  # fmt: skip
    made = {"benchmark": f"{name}_summary", "environment": document["environment"], "rows": rows}
    report_table(f"{name}_summary", made, table, output)


def main(folder: Annotated[Path, typer.Argument(help="Where the records are, and the summaries go.")]) -> None:
    """Summarise all records of a folder."""
    for file in sorted(folder.glob("*_quality_*.json")):
        if not file.stem.endswith("_summary"):
            summarise(file.stem, json.loads(file.read_text(encoding="utf-8")), folder)


if __name__ == "__main__":
    typer.run(main)
