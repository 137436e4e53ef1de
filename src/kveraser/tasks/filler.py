"""Natural text to surround the spans with.

Knows: sentences, a tokenizer's counts. Does not know what the text is for.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterable

from kveraser.errors import OptionError
from kveraser.tasks.splits import Split

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MIN_PASSAGES = 6


class Filler:
    """Passages of text, each a list of sentences; every third one is kept for evaluation.

    Args:
        passages: running text, any number of sentences each.
        count: text -> number of tokens.

    Raises:
        OptionError: too little text.
    """

    def __init__(self, passages: Iterable[str], count: Callable[[str], int]) -> None:
        split = [[s for s in _SENTENCE.split(" ".join(text.split())) if 20 < len(s) < 400] for text in passages]
        self._passages = [sentences for sentences in split if sentences]
        self._count, self._counts = count, dict[str, int]()
        if len(self._passages) < _MIN_PASSAGES:
            raise OptionError(
                f"the text has {len(self._passages)} usable passages, at least {_MIN_PASSAGES} are needed; "
                "give a longer one, with blank lines between its passages"
            )

    @property
    def sha256(self) -> str:
        """Tells texts apart: a checksum of the sentences that are drawn from."""
        return hashlib.sha256("\0".join(map("\n".join, self._passages)).encode("utf-8", "surrogatepass")).hexdigest()

    def count(self, text: str) -> int:
        """Number of tokens of a text."""
        if text not in self._counts:
            self._counts[text] = self._count(text)
        return self._counts[text]

    def _passage(self, rng: random.Random, split: Split) -> list[str]:
        while True:
            index = rng.randrange(len(self._passages))
            if (index % 3 == 2) == (split == "eval"):
                return self._passages[index]

    def sentence(self, rng: random.Random, split: Split) -> str:
        """One sentence of the split."""
        return rng.choice(self._passage(rng, split))

    def text(self, rng: random.Random, tokens: int, split: Split) -> str:
        """About `tokens` tokens of whole sentences from passages of the split; at least one sentence."""
        pieces: list[str] = []
        left = tokens
        while left > 0 or not pieces:
            for sentence in self._passage(rng, split):
                if left <= 0 and pieces:
                    break
                pieces.append(sentence)
                left -= self.count(sentence)
        return " ".join(pieces)
