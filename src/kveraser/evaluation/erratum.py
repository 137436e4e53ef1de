"""Erratum: nothing is erased; one line behind the context takes the spans back, or says what holds instead.

Knows: methods' interface, texts. Does not know about models or metrics.

The baseline of anyone who cannot edit a cache (arXiv 2606.17107 finds it strong for replaced facts). It is no erasing method of the
library: it adds tokens, and the erased text stays in the context, where it can be asked for. So it is a variant that comparisons
know: they put its line behind the context (`query_after`: before the question; `query_cached`: behind the question), count and time
the tokens of that line as its cost, and ask every method for what was taken back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from kveraser.errors import OptionError
from kveraser.methods import DeleteAndShift, EraseMethod, NoErase, as_method
from kveraser.tasks import EraseExample
from kveraser.tasks.asking import recall, with_line

_LINE = 'Erratum: "{text}" is wrong and is taken back; nothing of it holds.'
_NOW = "Correction: {text}"
_LONGEST = 200


class Said:
    """A variant of a method that adds a line, in which something is said about the spans."""

    name: ClassVar[str]

    def line(self, spans: Sequence[str], new: str | None) -> str:
        """The line, given the texts that are to be erased and what the first is to say instead, if anything."""
        raise NotImplementedError


@dataclass(frozen=True)
class Erratum(Said, NoErase):
    """Leave the cache alone and say in one line what does not hold, and what does."""

    name: ClassVar[str] = "erratum"
    summary: ClassVar[str] = "keep the cache and append one line that takes the span back (in comparisons only)"

    def line(self, spans: Sequence[str], new: str | None = None) -> str:
        """The line that takes texts back: each once, in one line, of long ones the beginning."""
        texts = dict.fromkeys(" ".join(text.split()) for text in spans)
        shown = [text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} ..." for text in texts]
        said = _LINE.format(text='" and "'.join(shown))
        return said if new is None else f"{said} {_NOW.format(text=' '.join(new.split()))}"


@dataclass(frozen=True)
class DeleteAndErratum(Said, DeleteAndShift):
    """Delete the spans and say in one line what holds instead. For replacements: where nothing does, there is nothing to say."""

    name: ClassVar[str] = "delete-and-erratum"
    summary: ClassVar[str] = (
        "delete-and-shift, and append one line with the new text (replacements, in comparisons only)"
    )
    replaces: ClassVar[bool] = False

    def line(self, spans: Sequence[str], new: str | None) -> str:
        """The line that says the new text.

        Raises:
            OptionError: nothing is replaced.
        """
        if new is None:
            raise OptionError(
                f"{self.name} compares replacements; there is no new text to append. Give it tasks that replace something, such as -t replaced"
            )
        return _NOW.format(text=" ".join(new.split()))


VARIANTS: tuple[type[EraseMethod], ...] = (Erratum, DeleteAndErratum)


@dataclass(frozen=True)
class Line:
    """What comparing a variant that adds a line takes.

    Attributes:
        corrected: the question with the line before it; where the question is in the context, the line and what asks again.
        recall: the request for what was taken back, behind the line.
    """

    corrected: str
    recall: str


@dataclass(frozen=True)
class Errata:
    """What comparing such variants takes, besides the question.

    Attributes:
        recall: the request for what was taken back, which all methods get.
        lines: for each variant that is compared, by its name.
    """

    recall: str
    lines: dict[str, Line]

    @classmethod
    def of(cls, example: EraseExample, methods: Iterable[EraseMethod], *, cached: bool) -> Errata | None:
        """For an example; None where no method adds a line. `cached`: its question is in the context.

        Raises:
            OptionError: a method has nothing to say about it.
        """
        texts = [text for text, erased in example.parts if erased]
        lines = {}
        for method in methods:
            if isinstance(method, Said):
                line = method.line(texts, example.new)
                corrected = with_line(example, line, cached=cached)
                lines[method.name] = Line(corrected, recall(example, line, cached=cached))
        return cls(recall(example, cached=cached), lines) if lines else None


def as_compared(name: str) -> EraseMethod:
    """What tables compare under a name: an erasing method of the library, or a variant that adds a line.

    Raises:
        OptionError: an unknown name or option, or an impossible value.
    """
    variant = next((kind for kind in VARIANTS if kind.name == name), None)
    return variant() if variant is not None else as_method(name)
