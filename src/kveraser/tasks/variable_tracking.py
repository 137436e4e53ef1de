"""Variable tracking: a chain of assignments in running text, whose first value is erased.

In the form of RULER's task (arXiv 2404.06654): `VAR A = 12345`, `VAR B = VAR A`, ... scattered over a text, beside chains that are not
asked about. RULER asks for all variables that have a value; here the value at the end of the chain is asked for, since that is what
an erased assignment takes away.
"""

from __future__ import annotations

import itertools
import random

from kveraser.tasks.base import EraseExample, Filler, Sizes, Split, Task, ask, halves
from kveraser.tasks.facts import scatter, stale

_NAMES = halves([f"{a}{b}{c}{d}" for a, c in ("BK", "DR", "FL", "GM", "HS", "JT", "MV", "PN", "QW", "TZ", "WX", "ZD")
                 for b in "AEIOU" for d in "KNRX"])  # fmt: skip
_VALUES = halves([str(10247 + 389 * n) for n in range(150)])
_TOKENS_PER_LINK, _LINKS = 100, (1, 4)


class VariableTracking(Task):
    """The erased span is a wrong assignment to the chain's first variable; the right one stands elsewhere, or nowhere."""

    name = "variable-tracking"
    summary = "a chain of assignments whose first value was wrong"

    def make(self, rng: random.Random, filler: Filler, sizes: Sizes, split: Split) -> EraseExample:
        before, behind = sizes.draw(rng)
        most = min(max(behind // _TOKENS_PER_LINK, _LINKS[0]), _LINKS[1])
        links = rng.randint(_LINKS[0], most)
        names = rng.sample(list(_NAMES(split)), 2 * (links + 1))
        chain, other = names[: links + 1], names[links + 1 :]
        right, wrong, third = rng.sample(list(_VALUES(split)), 3)
        known = rng.random() < 0.7

        def steps(variables: list[str]) -> list[str]:
            return [f"VAR {new} = VAR {old}." for old, new in itertools.pairwise(variables)]

        assignment = f"VAR {chain[0]} = {right}."
        early = known and rng.random() < 0.5
        late = [assignment] if known and not early else []
        prefix = scatter(rng, filler.text(rng, before, split), [assignment] if early else [])
        others = [f"VAR {other[0]} = {third}.", *steps(other)] if behind >= _TOKENS_PER_LINK else []
        suffix = scatter(rng, filler.text(rng, behind, split), [*late, *_merged(rng, steps(chain), others)])
        question = ask(f"Which number is the value of VAR {chain[-1]}?", f"The value of VAR {chain[-1]} is")
        texts = (f"{prefix} ", f"VAR {chain[0]} = {wrong}. ", suffix)
        return stale(rng, filler, split, texts, question, wrong, right if known else None)


def _merged(rng: random.Random, one: list[str], other: list[str]) -> list[str]:
    """Two lists as one, each in its own order."""
    order = [0] * len(one) + [1] * len(other)
    rng.shuffle(order)
    sources = iter(one), iter(other)
    return [next(sources[index]) for index in order]
