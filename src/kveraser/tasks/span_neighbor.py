"""Span-neighbor: an unrelated span between two neighbors in generic text. The data of the first training stage.

After the erase the model is cued with the end of the left neighbor and must go on with the start of the right one, as
it would had the span never been there (KVEraser, arXiv 2606.17034, names the stage; how it is made is our choice).
"""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task

_CUE, _GOAL = 10, 12
_SPANS = (8, 384)
_SHARE = 0.5


class SpanNeighbor(Task):
    """Any text: neighbors are cut apart at a sentence's border or in the middle of a sentence. Lengths in tokens of the
    span: about 8 to 384, on a logarithmic scale, at most half of what surrounds it."""

    name = "span-neighbor"
    summary = "an unrelated span between neighbors in generic text"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        before, behind = sizes.draw(rng)
        longest = max(min(_SPANS[1], _SHARE * (before + behind)), _SPANS[0])
        span = filler.text(rng, int(_SPANS[0] * (longest / _SPANS[0]) ** rng.random()), split)
        left, right = filler.text(rng, before, split), filler.text(rng, behind, split)
        if rng.random() < 0.5:  # in the middle of a sentence
            words = right.split(" ")
            cut = min(rng.randint(3, 9), len(words) - 1)
            left, right = f"{left} {' '.join(words[:cut])}", " ".join(words[cut:])
        gold, erased = (" ".join(text.split(" ")[:_GOAL]) for text in (right, span))
        if gold == erased:
            return self.make(rng, filler, sizes, split)
        cue = " ".join(left.split(" ")[-_CUE:])
        return EraseExample(
            prefix=f"{left} ",
            span=f"{span} ",
            suffix=right,
            question=f"\n\n{cue}",
            gold=gold,
            erased=erased,
            continuation=" " + filler.text(rng, 24, split),
            request=(f"Which words follow in the text right behind these? Answer with them alone.\n\n{cue}", ""),
        )
