"""Plots of an evaluation, readable without colour: every method has its own marker, line and hatching.

Knows: rows, matplotlib. Does not know where the rows come from; computes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import cycle, islice
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter
from matplotlib.transforms import Bbox, BboxBase

from kveraser.evaluation.erratum import as_compared
from kveraser.evaluation.record import Record
from kveraser.evaluation.statistics import rank_correlation
from kveraser.evaluation.summary import ASKED, KL, OVERALL, Row, task_names

_COLORS = ("#555555", "#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("x", "s", "o", "^", "D", "v", "P", "*")
_LINES = ("--", "-", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
_HATCHES = ("", "....", "////", "\\\\\\\\", "xxxx", "----", "oo", "++++")
# Where a point's name may stand, in points beside and above it, the best places first.
_PLACES = [(9, 0, "left"), (-9, 0, "right"), (0, 12, "center"), (0, -12, "center"), (7, 11, "left"), (7, -11, "left"),
           (-7, 11, "right"), (-7, -11, "right"), (0, 23, "center"), (0, -23, "center"), (0, 34, "center")]  # fmt: skip
_KL = "KL(recompute || method), nats per token"


def draw_plots(rows: Sequence[Row], records: Sequence[Record] = ()) -> dict[str, bytes]:
    """File name -> PNG, for `kl_by_length.png`, `kl_by_tokens.png`, `kl_by_task.png`, (where times were kept) `quality_cost.png`
    and (from records whose residual is known) `residual.png`."""
    plots = {
        "kl_by_length.png": _png(_kl_by_length(rows)),
        "kl_by_tokens.png": _png(_kl_by_tokens(rows)),
        "kl_by_task.png": _png(_kl_by_task(rows)),
    }
    if any(row.values["milliseconds"] for row in rows):
        plots["quality_cost.png"] = _png(_quality_cost(rows))
    told = [record for record in records if record.residual is not None and record.residual > 0 and record.kl > 0]
    if told:
        plots["residual.png"] = _png(_residual(told))
    return plots


def _kl_by_length(rows: Sequence[Row]) -> Figure:
    """Distance to full recomputation over the length of the context."""
    overall = [row for row in rows if row.task == OVERALL]
    lengths, styles = _lengths(overall), _styles(overall)
    protocols = _protocols(overall)
    figure, panels = _panels(1, len(protocols), width=5.2, height=4)
    for axes, protocol in zip(panels[0], protocols, strict=True):
        for index, (method, (color, marker, line, _)) in enumerate(styles.items()):
            aside = 2 ** (0.05 * (index - (len(styles) - 1) / 2))  # so that intervals do not cover each other
            own = {row.length: row for row in overall if row.method == method and row.protocol == protocol}
            points = [(n, own[n].values[KL.name]) for n in lengths if n in own]
            known = [(n, kl) for n, kl in points if kl is not None]
            axes.errorbar(
                [n * aside for n, _ in known], [kl.mean for _, kl in known],
                yerr=[[max(kl.mean - kl.low, 0) for _, kl in known], [max(kl.high - kl.mean, 0) for _, kl in known]],
                color=color, marker=marker, linestyle=line, capsize=3, linewidth=1.3, label=method,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(ASKED[protocol], fontsize=10)
        axes.set_xlabel("tokens in the context (about)")
    panels[0][0].set_ylabel(_KL)
    _legend(figure, panels[0][0])
    return figure


def _kl_by_tokens(rows: Sequence[Row]) -> Figure:
    """Distance to full recomputation over the tokens that an erase runs: one curve a method, and the best for every number."""
    overall = [row for row in rows if row.task == OVERALL]
    lengths, protocols = _lengths(overall), _protocols(overall)
    names = list(dict.fromkeys(as_compared(row.method).name for row in overall))
    looks = dict(zip(names, islice(cycle(zip(_COLORS, _MARKERS, _LINES, strict=True)), len(names)), strict=True))
    figure, panels = _panels(len(lengths), len(protocols), width=5.2, height=3.7)
    for line, length in zip(panels, lengths, strict=True):
        for axes, protocol in zip(line, protocols, strict=True):
            everything = []
            for name, (color, marker, style) in looks.items():
                points = sorted(
                    (run.mean, kl.mean)
                    for row in _cells(overall, length, protocol)
                    if as_compared(row.method).name == name
                    and (kl := row.values[KL.name])
                    and (run := row.values["tokens_recomputed"])
                )
                everything += [(*point, name) for point in points]
                axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=style, label=name)
            front = _front([point for point in everything if point[1] > 0])
            axes.plot(
                *zip(*((x, y) for x, y, _ in front), strict=True), color="#bbbbbb", linewidth=5, alpha=0.5, zorder=0
            )
            axes.set_xscale("symlog", linthresh=8)
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.set_title(f"{length} tokens, {ASKED[protocol]}", fontsize=10)
            axes.set_xlabel("tokens run by an erase")
        line[0].set_ylabel(_KL)
    _legend(figure, panels[0][0])
    return figure


def _cells(rows: Sequence[Row], length: int, protocol: str) -> list[Row]:
    """The rows of one length and protocol."""
    return [row for row in rows if (row.length, row.protocol) == (length, protocol)]


def _residual(records: Sequence[Record]) -> Figure:
    """What receipts say is left against what is left, example by example, with their rank correlation."""
    methods = list(dict.fromkeys(record.method for record in records))
    protocols = [protocol for protocol in ASKED if any(record.protocol == protocol for record in records)]
    figure, panels = _panels(1, len(protocols), width=5.2, height=4)
    for axes, protocol in zip(panels[0], protocols, strict=True):
        for index, method in enumerate(methods):
            own = [record for record in records if (record.method, record.protocol) == (method, protocol)]
            if not own:
                continue
            left, kl = [record.residual or 0.0 for record in own], [record.kl for record in own]
            color, marker = _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]
            name = f"{method} (rank correlation {rank_correlation(left, kl):.2f})"
            axes.plot(left, kl, color=color, marker=marker, linestyle="", markersize=4, alpha=0.7, label=name)
        axes.set_yscale("log")
        axes.legend(fontsize=7, frameon=False)
        axes.set_title(ASKED[protocol], fontsize=10)
        axes.set_xlabel("residual: share of the attention to the span not recomputed")
    panels[0][0].set_ylabel(_KL)
    return figure


def _quality_cost(rows: Sequence[Row]) -> Figure:
    """Distance to full recomputation against the time of an erase, and the best methods for every budget."""
    overall = [row for row in rows if row.task == OVERALL]
    lengths, styles, protocols = _lengths(overall), _styles(overall), _protocols(overall)
    figure, panels = _panels(len(lengths), len(protocols), width=5.2, height=3.7)
    for line, length in zip(panels, lengths, strict=True):
        for axes, protocol in zip(line, protocols, strict=True):
            points = []
            for row in overall:
                kl, time = row.values[KL.name], row.values["milliseconds"]
                if (row.length, row.protocol) == (length, protocol) and kl is not None and time is not None:
                    points.append((time.mean, kl.mean, row.method))
                    color, marker, _, _ = styles[row.method]
                    axes.plot([time.mean], [kl.mean], color=color, marker=marker, linestyle="", markersize=7)
            axes.set_xscale("log")
            axes.margins(x=0.3, y=0.15)
            front = _front(points)
            axes.plot(
                [p[0] for p in front], [p[1] for p in front], color="#999999", linewidth=1, linestyle="--", zorder=0
            )
            axes.set_title(f"{length} tokens, {ASKED[protocol]}", fontsize=10)
            axes.set_xlabel("milliseconds of an erase")
            _name_points(figure, axes, points)
        line[0].set_ylabel(_KL)
    return figure


def _kl_by_task(rows: Sequence[Row]) -> Figure:
    """Distance to full recomputation in every task; full recomputation itself is left out."""
    lengths, protocols = _lengths(rows), _protocols(rows)
    tasks, styles = task_names(rows), _styles(rows)
    shown = [m for m in styles if any(row.method == m and (kl := row.values[KL.name]) and kl.mean > 0 for row in rows)]
    figure, panels = _panels(len(lengths), len(protocols), width=5.2, height=1.2 + 0.11 * len(tasks) * (len(shown) + 1))
    thick = 1 / (len(shown) + 1)
    for line, length in zip(panels, lengths, strict=True):
        for axes, protocol in zip(line, protocols, strict=True):
            for index, method in enumerate(shown):
                color, _, _, hatch = styles[method]
                own = {r.task: r for r in rows if (r.length, r.protocol, r.method) == (length, protocol, method)}
                bars = [(at, kl) for at, task in enumerate(tasks) if task in own and (kl := own[task].values[KL.name])]
                axes.barh(
                    [at + (index - (len(shown) - 1) / 2) * thick for at, _ in bars], [kl.mean for _, kl in bars], thick,
                    xerr=[[max(kl.mean - kl.low, 0) for _, kl in bars], [max(kl.high - kl.mean, 0) for _, kl in bars]],
                    facecolor="white", edgecolor=color, hatch=hatch, linewidth=0.8, label=method,
                    error_kw={"linewidth": 0.7, "ecolor": "#333333"},
                )  # fmt: skip
            axes.set_title(f"{length} tokens, {ASKED[protocol]}", fontsize=10)
            axes.set_xlabel(_KL)
        line[0].set_yticks(range(len(tasks)), tasks)
        line[0].invert_yaxis()
        line[0].margins(y=0.02)
    _legend(figure, panels[0][0])
    return figure


def _front(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points that no other beats in both time and distance, by time."""
    found: list[tuple[float, float, str]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def _name_points(figure: Figure, axes: Axes, points: list[tuple[float, float, str]]) -> None:
    """Write the methods beside their points, where they cover the least of each other and of the points."""
    figure.canvas.draw()  # positions are known from here on
    spots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in spots]
    for (x, y, name), own in zip(points, list(taken), strict=True):
        best, least = None, float("inf")
        for right, up, align in _PLACES:
            text = axes.annotate(
                name, (x, y), xytext=(right, up), textcoords="offset points", ha=align, va="center", fontsize=8,
                path_effects=[withStroke(linewidth=3, foreground="white")],
            )  # fmt: skip
            box = text.get_window_extent()
            covered = sum(_shared(box, other) for other in taken if other is not own)
            covered += 2 * (box.width * box.height - _shared(box, axes.bbox))  # no name outside the panel
            if covered < least:
                if best is not None:
                    best.remove()
                best, least = text, covered
            else:
                text.remove()
        if best is not None:
            taken.append(best.get_window_extent())


def _shared(one: BboxBase, other: BboxBase) -> float:
    """The area of an overlap, in square pixels."""
    both = Bbox.intersection(one, other)
    return 0.0 if both is None else both.width * both.height


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(width * columns, height * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[list[Axes]] = figure.subplots(rows, columns, squeeze=False, sharey="row").tolist()
    for axes in (axes for line in panels for axes in line):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8, frameon=False, handlelength=4)


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str, Any, str]]:
    """Method -> color, marker, line, hatching."""
    methods = list(dict.fromkeys(row.method for row in rows))
    looks = islice(cycle(zip(_COLORS, _MARKERS, _LINES, _HATCHES, strict=True)), len(methods))
    return dict(zip(methods, looks, strict=True))


def _lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({row.length for row in rows})


def _protocols(rows: Sequence[Row]) -> list[str]:
    return [protocol for protocol in ASKED if any(row.protocol == protocol for row in rows)]


def _png(figure: Figure) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png", metadata={"Software": None})
    return picture.getvalue()
