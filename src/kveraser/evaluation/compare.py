"""Every erasing method on one and the same context.

Knows: contexts, methods, metrics. Does not know about tables, files or data sets.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from kveraser.erasable import ErasableContext
from kveraser.evaluation.metrics import kl_divergence
from kveraser.methods import EraseMethod, FullRecompute
from kveraser.spans import Span
from kveraser.tasks.base import frame_question

Protocol = Literal["query_after", "query_cached"]
PROTOCOLS: tuple[Protocol, Protocol] = ("query_after", "query_cached")


@dataclass(frozen=True)
class MethodResult:
    """One method on one context.

    Attributes:
        method: name; `used` is the one that `auto` chose.
        answer: greedy.
        exact: whether the whole cache then equals a fresh prefill.
        tokens_recomputed: tokens run through the model by the erase.
        milliseconds: of the erase; the median of the repeats.
        kl: KL(recompute || method) in nats per token of full recomputation's answer.
    """

    method: str
    used: str
    answer: str
    exact: bool
    tokens_recomputed: int
    milliseconds: float
    kl: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_parts(
    context: ErasableContext, prefix: str, span: str, suffix: str, question: str, protocol: Protocol
) -> tuple[Span, str | None]:
    """Let an empty context read an example; returns the span, and the question where it is still to be asked."""
    context.append(prefix)
    where = context.append(span)
    context.append(suffix)
    framed = frame_question(question)
    if protocol == "query_after":
        return where, framed
    context.append(framed)
    return where, None


def _logits(context: ErasableContext, question: list[int], answer: list[int]) -> Tensor:
    """Logits `(len(answer), vocab)` that predict the answer, behind the question or (none given) the context's end."""
    if question:
        return context.logits_ids([*question, *answer[:-1]])[len(question) - 1 :]
    return context.logits_ids(answer[:-1], from_last=True)


def compare_methods(
    context: ErasableContext,
    span: Span,
    question: str | None,
    methods: Sequence[EraseMethod],
    *,
    max_new_tokens: int = 16,
    min_new_tokens: int = 0,
    repeats: int = 1,
    done: Callable[[str], None] | None = None,
) -> list[MethodResult]:
    """Erase a span with each method in turn, undoing it in between; the context is left as it was.

    Args:
        question: asked behind the context after the erase (`query_after`); None when it is in the context already
            (`query_cached`: only its last token runs again).
        max_new_tokens, min_new_tokens: length of every answer; at least 1 keeps a model from answering nothing.
        repeats: erases per method; the time is their median.
        done: called with each method's name when it is through.
    """
    ids = [] if question is None else context.encode(question)
    receipt = context.erase(span, FullRecompute())
    lengths: dict[str, Any] = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}
    answer = context.generate_ids(ids, **lengths)
    teacher = _logits(context, ids, answer)
    context.restore(receipt)
    results = []
    for method in methods:
        times = []
        for _ in range(repeats - 1):
            receipt = context.erase(span, method)
            times.append(receipt.seconds)
            context.restore(receipt)
        receipt = context.erase(span, method)
        times.append(receipt.seconds)
        said = context.generate_ids(ids, **lengths)
        distance = kl_divergence(teacher, _logits(context, ids, answer)).mean().item()
        results.append(
            MethodResult(
                method=method.name,
                used=receipt.method,
                answer=context.decode(said).strip(),
                exact=receipt.exact,
                tokens_recomputed=receipt.tokens_recomputed,
                milliseconds=1000 * statistics.median(times),
                kl=max(distance, 0.0),
            )
        )
        context.restore(receipt)
        if done:
            done(method.name)
    return results
