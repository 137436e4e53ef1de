"""Many needles: numbers for many keys, or many numbers for one key, scattered over running text; a wrong one is erased.

In the form of RULER's multi-key and multi-value needles (arXiv 2404.06654), with sentences of our own.
"""

from __future__ import annotations

import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, ask, halves
from kveraser.tasks.facts import scatter, stale

_SENTENCES = halves(
    [
        "The lucky number of {key} is {value}.|lucky number",
        "The file number of {key} is {value}.|file number",
        "The secret number of {key} is {value}.|secret number",
        "The member number of {key} is {value}.|member number",
        "The magic number of {key} is {value}.|magic number",
        "The ticket number of {key} is {value}.|ticket number",
    ]
)
_KEYS = halves([f"{a} {b}" for a in ("quiet", "golden", "distant", "narrow", "ancient", "bright", "hollow", "gentle", "frozen")
                for b in ("harbor", "meadow", "lantern", "orchard", "canyon", "mirror", "anchor", "violin")])  # fmt: skip
_VALUES = halves([str(1000003 + 51787 * n) for n in range(170)])
_TOKENS_PER_NEEDLE, _NEEDLES = 60, 12


class MultiKeyNeedle(Task):
    """Every key has one number. The erased span is a wrong one for the key that is asked about; the right one stands elsewhere, or
    nowhere."""

    name = "needle-multikey"
    summary = "a stale number among numbers for many other keys"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        before, behind = sizes.draw(rng)
        sentence, what = rng.choice(_SENTENCES(split)).split("|")
        count = min(max((before + behind) // _TOKENS_PER_NEEDLE, 1), _NEEDLES)
        key, *keys = rng.sample(list(_KEYS(split)), count + 1)
        right, wrong, *values = rng.sample(list(_VALUES(split)), count + 2)
        needles = [sentence.format(key=other, value=value) for other, value in zip(keys, values, strict=True)]
        known = rng.random() < 0.7
        if known:
            needles.insert(rng.randint(0, count), sentence.format(key=key, value=right))
        cut = round(len(needles) * before / max(before + behind, 1))
        prefix = scatter(rng, filler.text(rng, before, split), needles[:cut])
        suffix = scatter(rng, filler.text(rng, behind, split), needles[cut:])
        asking = ask(f"What is the {what} of {key}?", f"The {what} of {key} is")
        texts = (f"{prefix} ", f"{sentence.format(key=key, value=wrong)} ", suffix)
        return stale(rng, filler, split, texts, asking, wrong, right if known else None)


class MultiValueNeedle(Task):
    """One key has several numbers, and all are asked for. The erased span says one that it does not have."""

    name = "needle-multivalue"
    summary = "a wrong number among all that one key has"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        before, behind = sizes.draw(rng)
        sentence, what = rng.choice(_SENTENCES(split)).split("|")
        key = rng.choice(_KEYS(split))
        wrong, *values = rng.sample(list(_VALUES(split)), rng.randint(3, 4))
        cut = rng.randint(0, len(values))
        needles = [sentence.format(key=key, value=value) for value in values]
        prefix = scatter(rng, filler.text(rng, before, split), needles[:cut])
        suffix = scatter(rng, filler.text(rng, behind, split), needles[cut:])
        question = (
            f"Which {what}s are said of {key}? Name all, in the order of the text, with the word and between them."
        )
        texts = (f"{prefix} ", f"{sentence.format(key=key, value=wrong)} ", suffix)
        return stale(rng, filler, split, texts, ask(question, f"The {what}s of {key} are"), wrong, " and ".join(values))
