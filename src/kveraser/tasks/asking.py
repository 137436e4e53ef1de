"""What else is said behind an example's context: a line of correction, and a request for what was taken back.

Knows: examples in plain and in chat form. Does not know about models, methods or metrics.
"""

from __future__ import annotations

from kveraser.tasks.base import EraseExample, ask, asked

_RECALL = "{question} Give the answer that was taken back, not the present one."


def with_line(example: EraseExample, line: str, *, cached: bool) -> str:
    """A line, and what asks for the answer behind it.

    Args:
        cached: it stands behind the example's question, which is then asked with its last line alone; else the line stands
            between the context and the question.
    """
    chat = example.chat
    if chat is None:
        return f"\n\n{line}\n{example.question.strip().splitlines()[-1]}" if cached else f"\n\n{line}{example.question}"
    if cached:
        return f"{chat.between}{line}{chat.closing}{chat.lead}"
    return f"{chat.opening}{line}\n\n{chat.words}{chat.closing}{chat.lead}"


def recall(example: EraseExample, line: str = "", *, cached: bool) -> str:
    """The request for what was taken back, where `with_line` (or the question alone) would stand.

    Args:
        line: the line that stands before it, if any.
        cached: the example's question was asked before.
    """
    chat = example.chat
    if chat is None:
        words, lead = asked(example.question)
        return (f"\n\n{line}" if line else "") + ask(_RECALL.format(question=words), lead)
    words = _RECALL.format(question=chat.words)
    said = f"{line}\n\n{words}" if line else words
    return f"{chat.between if cached else chat.opening}{said}{chat.closing}{chat.lead}"
