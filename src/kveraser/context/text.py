"""Finding spans by text.

Knows: tokenizers. Does not know about caches or models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable

from transformers import PreTrainedTokenizerBase

from kveraser.errors import SpanError
from kveraser.spans import Span

_ENOUGH = 20_000
"""Characters, of any language model's tokens more than the 2,000 that calibrating takes."""


def any_text() -> str:
    """Some English prose that every installation has: Python's own documentation."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:_ENOUGH]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids as it was written: special tokens kept, nothing tidied up."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def says_a_line(text: str) -> bool:
    """Whether a text has a whole line that is not blank."""
    return "\n" in text.lstrip()


class TokenBorders:
    """Where the tokens of a text begin and end.

    Borders are found by decoding prefixes (about 20 of them for one span), which works with every tokenizer, also where
    a character takes several tokens.

    Attributes:
        text: the text of the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        self.text = decode(tokenizer, ids)
        self._lengths: dict[int, int] = {}

    def span(self, start: int, end: int) -> Span:
        """The smallest span of whole tokens that holds the characters `[start, end)`; not empty."""
        counts = range(len(self._ids) + 1)
        first = bisect_left(counts, start, key=self._characters)
        if self._characters(first) > start:  # the text begins inside a token
            first -= 1
        last = bisect_left(counts, end, key=self._characters)
        return Span(first, max(last, first + 1))

    def characters(self, span: Span) -> tuple[int, int]:
        """The characters `[start, end)` that some tokens begin and end with."""
        return self._characters(span.start), self._characters(span.end)

    def _characters(self, count: int) -> int:
        """Whole characters in the first `count` tokens; a character that is cut decodes to something else."""
        if count not in self._lengths:
            start = decode(self._tokenizer, self._ids[:count])
            length = min(len(start), len(self.text))
            while length and start[length - 1] != self.text[length - 1]:
                length -= 1
            self._lengths[count] = length
        return self._lengths[count]


def occurrences(tokenizer: PreTrainedTokenizerBase, ids: list[int], needle: str) -> list[Span]:
    """Every place of `needle` in the text of `ids`, as the smallest spans of whole tokens that hold it.

    A token that holds a part of the text belongs to the span as a whole.
    """
    borders = TokenBorders(tokenizer, ids)
    spans = []
    at = borders.text.find(needle)
    while at >= 0:
        spans.append(borders.span(at, at + len(needle)))
        at = borders.text.find(needle, at + 1)
    return spans


def located(what: Span | str, named: Iterable[tuple[str | None, Span]], find: Callable[[str], Span]) -> Span:
    """The span meant by a span, by a name, or by a text.

    Args:
        named: spans with names, of messages for instance.
        find: finds a text that is no name (see `find_text`).

    Raises:
        SpanError: something else, or what `find` raises.
    """
    if isinstance(what, Span):
        return what
    if not isinstance(what, str):
        raise SpanError(f"a Span, a message id or a text is needed, got {type(what).__name__} {what!r}")
    return next((span for name, span in named if name == what), None) or find(what)


def find_text(tokenizer: PreTrainedTokenizerBase, runs: Iterable[tuple[Span, list[int]]], needle: str) -> Span:
    """The one place of a text in runs of live tokens (a text that reaches over an erased span is not found).

    Raises:
        SpanError: empty, not found, or found more than once.
    """
    if not needle:
        raise SpanError("the text to erase is empty")
    found = [span.shift(run.start) for run, ids in runs for span in occurrences(tokenizer, ids, needle)]
    shown = needle if len(needle) <= 60 else f"{needle[:57]}..."
    if not found:
        raise SpanError(
            f"the text {shown!r} is not in the context (and there is no message with that id); check spaces and line "
            "breaks, or give a Span"
        )
    if len(found) > 1:
        places = ", ".join(str(span) for span in found[:5])
        raise SpanError(
            f"the text {shown!r} occurs {len(found)} times, at {places}; give a longer text or one of these spans"
        )
    return found[0]
