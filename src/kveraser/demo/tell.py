"""Telling a story: the context is read, the span erased by each method, the question asked.

Knows: stories, contexts, comparing. Does not know about the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from kveraser.cache import Can
from kveraser.context import LiveContext
from kveraser.demo.stories import Story
from kveraser.errors import CalibrationError
from kveraser.evaluation import MethodResult, Protocol, compare_methods, read_parts
from kveraser.evaluation.compare import Context
from kveraser.methods import EraseMethod
from kveraser.spans import Span
from kveraser.tasks import ask

Done = Callable[[MethodResult], None]


@dataclass(frozen=True)
class Told:
    """A story in both protocols, by every method.

    Attributes:
        after, cached: asked after the erase, and with the question in the cache.
        words, read: what follows the erased text, token by token, and how much each has attended to it; empty where
            that is not known.
        behind: how many tokens follow the erased text.
    """

    after: list[MethodResult]
    cached: list[MethodResult]
    words: list[str]
    read: list[float]
    behind: int


def tell_both(story: Story, context: Context, methods: Sequence[EraseMethod], *, done: Done | None = None) -> Told:
    """One story in both protocols, by the given methods; `context` is a new one."""
    spans = _read(story, context)
    tells = isinstance(context, LiveContext) and Can.TELL in context.backend.can
    words, read = who_read(cast("LiveContext", context), spans) if tells else ([], [])
    behind = len(context.encode(story.suffix))
    after = _compare(story, context, spans, methods, ask(story.question), done)
    context.append(ask(story.question))
    return Told(after, _compare(story, context, spans, methods, None, done), words, read, behind)


def tell(
    story: Story, context: Context, methods: Sequence[EraseMethod], protocol: Protocol, *, done: Done | None = None
) -> list[MethodResult]:
    """One story in one protocol, by the given methods; `context` is a new one."""
    spans = _read(story, context)
    question: str | None = ask(story.question)
    if protocol == "query_cached":
        context.append(ask(story.question))
        question = None
    return _compare(story, context, spans, methods, question, done)


def who_read(context: LiveContext, spans: Sequence[Span]) -> tuple[list[str], list[float]]:
    """What follows some spans, token by token, and how much each token has attended to them; nothing where that cannot be told."""
    first = spans[-1].end
    try:
        read = context.readers(list(spans))[first:].tolist()
    except CalibrationError:
        return [], []
    return [context.text_of(Span(position, position + 1)) for position in range(first, len(context))], read


def _read(story: Story, context: Context) -> tuple[Span, ...]:
    return read_parts(context, [(story.prefix, False), (story.span, True), (story.suffix, False)])


def _compare(
    story: Story,
    context: Context,
    spans: Sequence[Span],
    methods: Sequence[EraseMethod],
    question: str | None,
    done: Done | None,
) -> list[MethodResult]:
    return compare_methods(context, spans, question, methods, erased=story.erased, min_new_tokens=1, done=done)
