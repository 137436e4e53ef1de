"""Who has read a text? A picture of a text of your own, in which the darkness of a word says how much it attended to a span.

Knows: a context, matplotlib. Whoever has read the span is what an erase has to recompute; everything else can stay.

    python examples/who_read_it.py notes.txt "The code is 1234." --output who_read_it.png
    python examples/who_read_it.py                    # on a page about an invented town
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import kveraser as kv
from kveraser.demo.stories import stories

WIDTH, LINE, SIZE = 9.0, 0.26, 9.5  # inches, inches, points


def main() -> None:
    """Read, score, draw, erase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="a text file; without one, a story of the demo")
    parser.add_argument("span", nargs="?", help="a text that occurs once in it")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument(
        "--tokens", type=int, help="how many tokens the erase recomputes (underlined); as many as by default"
    )
    parser.add_argument("--output", type=Path, default=Path("who_read_it.png"))
    options = parser.parse_args()
    story = stories(behind=3)[0]
    text = options.file.read_text(encoding="utf-8") if options.file else story.prefix + story.span + story.suffix
    wanted = options.span or (story.span if options.file is None else parser.error("say which text is to be erased"))

    model, tokenizer = kv.load_backbone(options.model)
    context = kv.ErasableContext(model, tokenizer)
    context.append(text)
    span = context.locate(wanted)
    read = context.readers(span)  # one number for each token: its share of attention that went to the span
    words = [context.text_of(kv.Span(position, position + 1)) for position in range(len(context))]

    receipt = context.erase(span, method=kv.Steering(repair=options.tokens))
    again = {position for run in receipt.recomputed for position in run}
    left = "" if receipt.residual is None else f"; {receipt.residual:.0%} of the attention to it is left"
    title = f"Recomputed {len(again)} of {len(words) - span.end} tokens behind it in {receipt.seconds:.2f} s{left}"
    draw(words, read.tolist(), span, again, title).savefig(options.output, dpi=150)
    print(f"{options.output}: {title}")


def draw(words: list[str], read: list[float], span: kv.Span, again: set[int], title: str) -> Figure:
    """The text, the erased span struck out in red, its readers darker the more they read, recomputed ones underlined."""
    figure = Figure(figsize=(WIDTH, 1.0))
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.02, 0.0, 0.96, 1.0))
    axes.axis("off")
    most, x, y = max(read) or 1.0, 0.0, 0.0
    width, renderer = WIDTH * 0.96, canvas.get_renderer()
    for position, word in enumerate(words):
        for index, line in enumerate(word.split("\n")):
            if index:
                x, y = 0.0, y - LINE
            line = line if x else line.lstrip(" ")
            if not line:
                continue
            shade = (1.0, 0.55, 0.1, 0.9 * read[position] / most)
            inside = position in span
            made = axes.text(
                x, y, line, fontsize=SIZE, family="monospace", va="baseline", color="#b3261e" if inside else "#1c1d1f",
                bbox={"facecolor": "#fbe6e4" if inside else shade, "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip
            length = made.get_window_extent(renderer).width / figure.dpi
            if x + length > width:
                x, y = 0.0, y - LINE
                made.set_position((x, y))
            if inside or position in again:
                height = y + 0.05 if inside else y - 0.04
                axes.plot(
                    [x, x + length], [height, height], color="#b3261e" if inside else "#22734a", linewidth=1, zorder=5
                )
            x += length
    axes.set_xlim(0, width)
    axes.set_ylim(y - LINE, 2 * LINE)
    axes.text(0, LINE, title, fontsize=SIZE + 1, weight="bold")
    figure.set_size_inches(WIDTH, 3 * LINE - y)
    return figure


if __name__ == "__main__":
    main()
