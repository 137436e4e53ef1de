"""What is selected of a session: from a text, a message or characters to spans, and from spans to characters.

Knows: contexts, characters. Does not know about HTTP. The session's text is that of its runs, live and erased ones, joined;
characters are counted in it as Unicode code points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kveraser.context import ErasableContext
from kveraser.context.text import TokenBorders, find_text
from kveraser.errors import SpanError
from kveraser.spans import Span


@dataclass(frozen=True)
class Selection:
    """What of a session is meant: a text that occurs once in what is live, a message by its id, ledger spans, or characters of the
    session's text."""

    text: str | None = None
    message: str | None = None
    spans: tuple[Span, ...] = ()
    characters: tuple[tuple[int, int], ...] = ()

    def spans_in(self, context: ErasableContext) -> tuple[Span, ...]:
        """The ledger spans.

        Raises:
            SpanError: no message with that id; a text that is not there, or more than once; characters that are not
                there, or erased already.
        """
        if self.characters:
            return spans_of_characters(context, self.characters)
        if self.message is not None:
            found = [span for message, span in context.messages if message.id == self.message]
            if not found:
                raise SpanError(f"the session has no message with id {self.message!r}")
            return tuple(run for span in found for run in context.standing(span))
        if self.text is None:
            return self.spans
        assert context.tokenizer is not None
        return (find_text(context.tokenizer, ((run, context.ids_of(run)) for run in context.live_spans), self.text),)

    def said_instead(self, context: ErasableContext, new: str) -> str:
        """A text for the place of what is meant, with what else the tokens of that say before and behind it.

        Raises:
            SpanError: as `spans_in`.
        """
        if not new or self.spans:
            return new
        if not self.characters:
            return context.fitted(self.text or self.message or "", new)
        spans = self.spans_in(context)
        first, last = (characters_of(context, [span])[0] for span in (spans[0], spans[-1]))
        whole = "".join(context.text_of(run.span) for run in runs_of(context))
        return whole[first[0] : self.characters[0][0]] + new + whole[self.characters[-1][1] : last[1]]


@dataclass(frozen=True)
class Run:
    """A maximal run of the ledger that is live, or one that was erased."""

    span: Span
    live: bool


def runs_of(context: ErasableContext) -> list[Run]:
    """All runs of a context in the order of its text: what replaced a run stands before it."""
    return [Run(span, live) for span, live in context.runs]


def spans_of_characters(context: ErasableContext, ranges: Sequence[tuple[int, int]]) -> tuple[Span, ...]:
    """The smallest ledger spans that hold ranges of characters, `[start, end)` each; what is erased already is left out.

    Raises:
        SpanError: an empty or reversed range, one that ends behind the text, or one without live text.
    """
    borders, at = _borders(context)
    spans = list[Span]()
    for start, end in ranges:
        if not 0 <= start < end <= at:
            raise SpanError(f"characters [{start}, {end}) are no part of the session's text, which has {at}")
        inside = [
            text.span(max(start - first, 0), min(end - first, len(text.text))).shift(run.start)
            for first, run, text in borders
            if start < first + len(text.text) and first < end
        ]
        if not inside:
            raise SpanError(f"the characters [{start}, {end}) are erased already")
        spans += inside
    return tuple(spans)


def characters_of(context: ErasableContext, spans: Sequence[Span]) -> list[tuple[int, int]]:
    """The characters `[start, end)` of live ledger spans, each of which is within one run; in the order of the spans."""
    borders = _borders(context)[0] if spans else []
    found = []
    for span in spans:
        for first, run, text in borders:
            if run.start <= span.start and span.end <= run.end:
                start, end = text.characters(span.shift(-run.start))
                found.append((first + start, first + end))
    return found


def _borders(context: ErasableContext) -> tuple[list[tuple[int, Span, TokenBorders]], int]:
    """The live runs: first character, ledger span and token borders of each; and the length of the whole text."""
    assert context.tokenizer is not None
    borders, at = list[tuple[int, Span, TokenBorders]](), 0
    for run in runs_of(context):
        found = TokenBorders(context.tokenizer, context.ids_of(run.span))
        if run.live:
            borders.append((at, run.span, found))
        at += len(found.text)
    return borders, at
