"""Finding spans by text.

Knows: tokenizers. Does not know about caches or models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from kveraser.errors import SpanError
from kveraser.spans import Span


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids as it was written: special tokens kept, nothing tidied up."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text if isinstance(text, str) else "".join(text)


def occurrences(tokenizer: PreTrainedTokenizerBase, ids: list[int], needle: str) -> list[Span]:
    """Every place of `needle` in the text of `ids`, as the smallest spans of whole tokens that hold it.

    Token borders are found by decoding prefixes (about 20 of them), which works with every tokenizer, also where a
    character takes several tokens. A token that holds a part of the text belongs to the span as a whole.
    """
    text = decode(tokenizer, ids)
    lengths: dict[int, int] = {}

    def characters(count: int) -> int:
        """Whole characters in the first `count` tokens; a character that is cut decodes to something else."""
        if count not in lengths:
            start = decode(tokenizer, ids[:count])
            length = min(len(start), len(text))
            while length and start[length - 1] != text[length - 1]:
                length -= 1
            lengths[count] = length
        return lengths[count]

    spans = []
    counts = range(len(ids) + 1)
    at = text.find(needle)
    while at >= 0:
        start = bisect_left(counts, at, key=characters)
        if characters(start) > at:  # the text begins inside a token
            start -= 1
        end = bisect_left(counts, at + len(needle), key=characters)
        spans.append(Span(start, max(end, start + 1)))
        at = text.find(needle, at + 1)
    return spans


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
