"""Draw the figure that README opens with: KL of every method at the same number of recomputed tokens, one panel a backbone.

Knows: `results.json` of some folders, matplotlib. Computes nothing.

Usage: python docs/draw_overview.py RESULTS FILE FOLDER...
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fill_results import short_name
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kveraser.evaluation.summary import ASKED, KL, OVERALL, Row

COLORS = {"query_after": "#9db8dd", "query_cached": "#2456a6"}
SAID = {"query_after": "question asked after the erase", "query_cached": "question read before the erase (harder)"}
LEAST = 1e-4


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("folders", nargs="+")
    given = parser.parse_args()
    documents = [
        json.loads(file.read_text(encoding="utf-8"))
        for folder in given.folders
        if (file := given.results / folder / "results.json").exists()
    ]
    figure = Figure(figsize=(4.4 * len(documents) + 1.6, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(documents), squeeze=False)[0]
    for axes, document in zip(panels, documents, strict=True):
        rows = [row for row in map(Row.from_dict, document["rows"]) if row.task == OVERALL]
        labels = [m for m in dict.fromkeys(r.method for r in rows) if any(kl_of(r, m) > 0 for r in rows)]
        for offset, protocol in zip((-0.2, 0.2), ASKED, strict=True):
            own = {row.method: row.values[KL.name] for row in rows if row.protocol == protocol}
            values = [(at, own[label]) for at, label in enumerate(labels) if own.get(label) is not None]
            axes.barh(
                [at + offset for at, _ in values], [max(kl.mean, LEAST) for _, kl in values], 0.38, color=COLORS[protocol],
                xerr=[[max(kl.mean - kl.low, 0) for _, kl in values], [max(kl.high - kl.mean, 0) for _, kl in values]],
                error_kw={"linewidth": 0.8, "ecolor": "#333333"}, label=SAID[protocol],
            )  # fmt: skip
        axes.set_yticks(range(len(labels)), [short_name(label) for label in labels], fontsize=8)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(left=LEAST)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        budget = max(row.values["tokens_recomputed"].mean for row in rows if row.method.startswith("kveraser:"))
        axes.set_title(
            f"{document['options']['model']}\n{rows[0].length} tokens, {budget:.0f} recomputed, {rows[0].examples} examples",
            fontsize=9,
        )
    panels[0].set_xlabel("distance to full recomputation: KL, nats per token (less is better)", fontsize=8)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    given.file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.file, metadata={"Software": None})


def kl_of(row: Row, label: str) -> float:
    """A method's mean KL in a row; 0 in other methods' rows."""
    value = row.values[KL.name]
    return value.mean if row.method == label and value is not None else 0.0


if __name__ == "__main__":
    main()
