"""Telling a story: the context is read, the span erased by each method, the question asked.

Knows: stories, contexts, comparing. Does not know about the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kveraser.demo.stories import Story
from kveraser.erasable import ErasableContext
from kveraser.eraser import KVEraser
from kveraser.evaluation.compare import MethodResult, Protocol, compare_methods, read_parts
from kveraser.methods import EraseMethod


def tell(
    story: Story,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eraser: KVEraser | None,
    methods: Sequence[EraseMethod],
    protocol: Protocol,
    *,
    done: Callable[[str], None] | None = None,
) -> list[MethodResult]:
    """One story in one protocol, by the given methods."""
    context = ErasableContext(model, tokenizer, eraser)
    span, question = read_parts(context, story.prefix, story.span, story.suffix, story.question, protocol)
    return compare_methods(context, span, question, methods, min_new_tokens=1, repeats=2, done=done)
