"""Erratum: nothing is erased; one line behind the context takes the spans back.

Knows: methods' interface, texts. Does not know about models or metrics.

The baseline of anyone who cannot edit a cache (arXiv 2606.17107 finds it strong for replaced facts). It is no erasing method of the
library: it adds tokens, and the erased text stays in the context, where it can be asked for. So it is a variant that comparisons
know: they put its line behind the context (`query_after`: before the question; `query_cached`: behind the question), count and time
the tokens of that line as its cost, and ask every method for what was taken back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kveraser.methods import EraseMethod, NoErase, as_method
from kveraser.tasks import EraseExample
from kveraser.tasks.asking import recall, with_line

_LINE = 'Erratum: "{text}" is wrong and is taken back; nothing of it holds.'
_LONGEST = 200


@dataclass(frozen=True)
class Erratum(NoErase):
    """Leave the cache alone and say in one line what does not hold."""

    name: ClassVar[str] = "erratum"
    summary: ClassVar[str] = "keep the cache and append one line that takes the span back (in comparisons only)"

    def line(self, spans: Sequence[str]) -> str:
        """The line that takes texts back: each once, in one line, of long ones the beginning."""
        texts = dict.fromkeys(" ".join(text.split()) for text in spans)
        shown = [text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} ..." for text in texts]
        return _LINE.format(text='" and "'.join(shown))


@dataclass(frozen=True)
class Errata:
    """What comparing the erratum takes, besides the question.

    Attributes:
        corrected: the question with the line before it; where the question is in the context, the line and what asks again.
        recall: the request for what was taken back.
        corrected_recall: the same behind the line.
    """

    corrected: str
    recall: str
    corrected_recall: str

    @classmethod
    def of(cls, example: EraseExample, *, cached: bool) -> Errata:
        """For an example; `cached`: its question is in the context."""
        line = Erratum().line([text for text, erased in example.parts if erased])
        return cls(
            with_line(example, line, cached=cached),
            recall(example, cached=cached),
            recall(example, line, cached=cached),
        )


def as_compared(name: str) -> EraseMethod:
    """What tables compare under a name: an erasing method of the library, or `erratum`.

    Raises:
        OptionError: an unknown name or option, or an impossible value.
    """
    return Erratum() if name == Erratum.name else as_method(name)
