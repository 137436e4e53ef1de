"""Telling a story: the context is read, the span erased by each method, the question asked.

Knows: stories, contexts, comparing. Does not know about the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kveraser.demo.stories import Story
from kveraser.evaluation import MethodResult, Protocol, compare_methods, read_parts
from kveraser.evaluation.compare import Context
from kveraser.methods import EraseMethod
from kveraser.tasks import ask


def tell(
    story: Story,
    context: Context,
    methods: Sequence[EraseMethod],
    protocol: Protocol,
    *,
    done: Callable[[MethodResult], None] | None = None,
) -> list[MethodResult]:
    """One story in one protocol, by the given methods; `context` is a new one."""
    spans = read_parts(context, [(story.prefix, False), (story.span, True), (story.suffix, False)])
    question: str | None = ask(story.question)
    if protocol == "query_cached":
        context.append(ask(story.question))
        question = None
    return compare_methods(
        context, spans, question, methods, erased=story.erased, min_new_tokens=1, repeats=2, done=done
    )
