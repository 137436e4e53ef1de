"""Parts of a conversation erased from its tokens: the contents of results, the arguments of calls.

Knows: where the template shows them. Does not know why they are cleared or what becomes of the tokens.

The conversation is tokenised as it is, and the tokens that lie within what is cleared are left out: so its ids are those of
the conversation that was cached, minus some runs, which is what the server understands best. A token that reaches over the
border of a content stays. Where the template does not show a content as it is, an empty one is shown instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from kveraser.serving.chat.messages import ChatMessage


@dataclass(frozen=True)
class Cleared:
    """What of a conversation is cleared: `results` are indices of messages, `inputs` of messages and their calls."""

    results: frozenset[int] = frozenset()
    inputs: frozenset[tuple[int, int]] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.results or self.inputs)


NOTHING = Cleared()
"""Nothing is cleared."""


def cleared_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[ChatMessage],
    cleared: Cleared,
    render: Callable[[Sequence[ChatMessage]], str],
) -> tuple[int, ...]:
    """The ids of a conversation without what is cleared.

    Args:
        render: the text of a conversation.
    """
    text = render(messages)
    ranges = _ranges(text, messages, cleared, render)
    if ranges is None:
        empty = _changed(messages, cleared, lambda index: "", lambda index, number: {})
        return tuple(tokenizer.encode(render(empty), add_special_tokens=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    kept = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        while ranges and ranges[0][1] <= start:
            ranges.pop(0)
        if not (ranges and ranges[0][0] <= start < end <= ranges[0][1]):
            kept.append(token)
    return tuple(kept)


def _ranges(
    text: str, messages: Sequence[ChatMessage], cleared: Cleared, render: Callable[[Sequence[ChatMessage]], str]
) -> list[tuple[int, int]] | None:
    """The characters of what is cleared, in order; None where the template shows something else in its place."""
    mark = "kveraser-mark"
    while mark in text:
        mark += "x"
    said: dict[str, tuple[str, ...]] = {}

    def marked_text(index: int) -> str:
        name = f"{mark}-{index}-"
        said[name] = (messages[index].text, messages[index].text.strip())
        return name

    def marked_arguments(index: int, number: int) -> dict[str, object]:
        name, arguments = f"{mark}-{index}-{number}-", messages[index].calls[number].arguments
        written = (
            json.dumps(arguments, ensure_ascii=ascii_only, separators=separators)[1:-1]
            for ascii_only in (False, True)
            for separators in ((", ", ": "), (",", ":"))
        )
        said[name] = tuple(written) if isinstance(arguments, dict) else ()
        return {name: 0}

    shown = render(_changed(messages, cleared, marked_text, marked_arguments))
    pieces = re.split(f'("{re.escape(mark)}[-0-9]+": ?0|{re.escape(mark)}[-0-9]+)', shown)
    fixed, names = pieces[::2], [piece.split('"')[1] if '"' in piece else piece for piece in pieces[1::2]]
    if sorted(names) != sorted(said) or not text.startswith(fixed[0]):
        return None
    ranges, at = [], len(fixed[0])
    for name, behind in zip(names, fixed[1:], strict=True):
        content = next((each for each in said[name] if text.startswith(each + behind, at)), None)
        if content is None:
            return None
        ranges.append((at, at + len(content)))
        at += len(content) + len(behind)
    return ranges if at == len(text) else None


def _changed(
    messages: Sequence[ChatMessage],
    cleared: Cleared,
    text: Callable[[int], str],
    arguments: Callable[[int, int], dict[str, object]],
) -> list[ChatMessage]:
    """The messages with something else in place of what is cleared."""
    changed = []
    for index, message in enumerate(messages):
        calls = tuple(
            replace(call, arguments=arguments(index, number)) if (index, number) in cleared.inputs else call
            for number, call in enumerate(message.calls)
        )
        said = text(index) if index in cleared.results else message.text
        changed.append(replace(message, text=said, calls=calls))
    return changed
