"""Every erasing method on one and the same context.

Knows: contexts, methods, metrics. Does not know about tables, files or data sets.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal
from typing import Protocol as Interface

import torch
from torch import Tensor

from kveraser.context import RestoreReport, Step, says_a_line
from kveraser.errors import OptionError
from kveraser.evaluation.erratum import Errata, Said
from kveraser.evaluation.metrics import agreement, kl_divergence, log_probability
from kveraser.methods import EraseMethod, EraseReceipt, FullRecompute, method_label
from kveraser.model.view import finish
from kveraser.spans import Span

Protocol = Literal["query_after", "query_cached"]
PROTOCOLS: tuple[Protocol, Protocol] = ("query_after", "query_cached")


class Context(Interface):
    """What a context must be able to do to be compared: `ErasableContext`, or the context of an engine."""

    @property
    def device(self) -> torch.device: ...
    def append(self, text: Any, /) -> Span: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def erase(self, what: Any, method: Any) -> Any: ...
    @property
    def replace(self) -> Callable[[Any, Any, Any], Any]: ...
    def restore(self, receipt: Any) -> RestoreReport: ...
    def logits_ids(self, ids: Any, *, from_last: bool = False) -> Tensor: ...
    @property
    def reply_ids(self) -> Callable[..., list[int]]: ...


@dataclass(frozen=True)
class MethodResult:
    """One method on one context.

    Attributes:
        method: its label, such as `kveraser:repair=32`; `used` is the method that `auto` chose, else the same.
        answer: greedy, one line.
        exact: whether the whole cache then equals a fresh prefill.
        tokens_recomputed: tokens run through the model by the erase.
        residual: what the erase says it left (`EraseReceipt.residual`).
        milliseconds: of the erase; the median of the repeats.
        kl: KL(recompute || method) in nats per token of full recomputation's answer.
        agreement: share of these tokens for which both find the same token the most likely.
        leak_margin: mean log-probability of the erased answer's tokens, teacher-forced, minus that under full
            recomputation, in nats per token; None without an erased answer.
        recall: the answer to a request for what was taken back; None where that was not asked.
    """

    method: str
    used: str
    answer: str
    exact: bool
    tokens_recomputed: int
    residual: float | None
    milliseconds: float
    kl: float
    agreement: float
    leak_margin: float | None
    recall: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_parts(context: Context, parts: Iterable[tuple[str, bool]], *, chat: bool = False) -> tuple[Span, ...]:
    """Let a context read texts one after the other; returns the spans of those that are to be erased.

    Args:
        chat: the texts begin with whatever a model wants at its beginning, so that no token is put before them.
    """
    spans = []
    for text, erased in parts:
        if text:
            span = context.append(context.encode(text) if chat else text)
            if erased:
                spans.append(span)
    return tuple(spans)


@dataclass(frozen=True)
class Answering:
    """How answers are made and told.

    Attributes:
        max_new_tokens, min_new_tokens: length of every answer; at least 1 keeps a model from answering nothing.
        ends: tokens that end an answer, besides those of the model's own and the end of its first line.
        gap: what stands between a question and its answer.
    """

    max_new_tokens: int = 16
    min_new_tokens: int = 0
    ends: tuple[int, ...] = ()
    gap: str = " "


@dataclass(frozen=True)
class _Seen:
    """What one method left behind: its receipt, the seconds it took, the answer, and what is likely now.

    `logits` are those of full recomputation's answer, `(tokens, vocab)`; `erased` is the log-probability of the
    erased answer, `recall` the answer to the request for what was taken back.
    """

    receipt: EraseReceipt
    seconds: float
    said: list[int]
    logits: Tensor
    erased: float | None
    recall: str | None


class _Comparison:
    """The same erase and the same question, by one method after the other."""

    def __init__(
        self,
        context: Context,
        spans: Sequence[Span],
        question: str | None,
        erased: str | None,
        answering: Answering,
        errata: Errata | None,
        repeats: int,
        new: str | None,
    ) -> None:
        self.context, self.spans, self.answering, self.repeats = context, spans, answering, repeats
        self.question = [] if question is None else context.encode(question)
        self.erased = context.encode(f"{answering.gap}{erased}") if erased else []
        self.errata = errata
        self.new = None if new is None else context.encode(new)

    def see(self, method: EraseMethod, answer: list[int] | None) -> _Seen:
        """Erase, ask and undo. `answer` is full recomputation's; None if this is full recomputation."""
        times = []
        for _ in range(self.repeats - 1):
            receipt, seconds = self._erase(method)
            times.append(seconds)
            self.context.restore(receipt)
        receipt, seconds = self._erase(method)
        question = self.asked(method)
        said = self._answer(question)
        logits = self._logits(question, said if answer is None else answer)
        erased = log_probability(self._logits(question, self.erased), self.erased) if self.erased else None
        recall = None
        if self.errata:
            asked = self.errata.lines[method.name].recall if isinstance(method, Said) else self.errata.recall
            recall = self.context.decode(self._answer(self.context.encode(asked))).strip()
        self.context.restore(receipt)
        return _Seen(receipt, statistics.median([*times, seconds]), said, logits, erased, recall)

    def asked(self, method: EraseMethod) -> list[int]:
        """The question, with the line before it where the method adds one."""
        if isinstance(method, Said):
            assert self.errata is not None  # checked before
            return self.context.encode(self.errata.lines[method.name].corrected)
        return self.question

    def line(self, method: EraseMethod) -> list[int]:
        """What a method adds to what is read anyway."""
        corrected = self.asked(method)
        return corrected[: len(corrected) - len(self.question)]

    def _erase(self, method: EraseMethod) -> tuple[EraseReceipt, float]:
        line = self.line(method)
        finish(self.context.device)
        started = time.perf_counter()
        if self.new is None or isinstance(method, Said):
            receipt = self.context.erase(self.spans, method)
        else:
            receipt = self.context.replace(self.spans, self.new, method)
        if line:
            self.context.logits_ids(line)
        finish(self.context.device)
        return receipt, time.perf_counter() - started

    def _answer(self, question: list[int]) -> list[int]:
        def stops(step: Step) -> bool:
            return step.token in self.answering.ends or says_a_line(self.context.decode(step.answer))

        return self.context.reply_ids(
            question, max_new_tokens=self.answering.max_new_tokens, min_new_tokens=self.answering.min_new_tokens, watch=stops
        )  # fmt: skip

    def _logits(self, question: list[int], answer: list[int]) -> Tensor:
        """Logits `(len(answer), vocab)` that predict an answer behind the question or (none) the context's end."""
        if question:
            return self.context.logits_ids([*question, *answer[:-1]])[len(question) - 1 :]
        return self.context.logits_ids(answer[:-1], from_last=True)


def compare_methods(
    context: Context,
    spans: Span | Sequence[Span],
    question: str | None,
    methods: Sequence[EraseMethod],
    *,
    erased: str | None = None,
    max_new_tokens: int = 16,
    min_new_tokens: int = 0,
    ends: Sequence[int] = (),
    gap: str = " ",
    new: str | None = None,
    errata: Errata | None = None,
    repeats: int = 1,
    done: Callable[[MethodResult], None] | None = None,
) -> list[MethodResult]:
    """Erase spans with each method in turn, undoing it in between; the context is left as it was.

    Args:
        spans: erased together.
        question: asked behind the context after the erase (`query_after`); None when it is in the context already
            (`query_cached`: only its last token runs again).
        erased: the answer that only the spans support, for `leak_margin`.
        max_new_tokens, min_new_tokens, ends, gap: see `Answering`.
        new: what the first of the spans is to say instead, to compare replacements; the others are erased.
        errata: for the variants that add a line; every method is then also asked for what was taken back.
        repeats: erases per method; the time is their median.
        done: called with each method's result when it is through.

    Raises:
        OptionError: a variant that adds a line is to be compared, and nothing says what it is.
    """
    for method in methods:
        if isinstance(method, Said) and (errata is None or method.name not in errata.lines):
            raise OptionError(
                f"{method.name} cannot be compared here: no line says what is taken back (compare_methods(errata=...))"
            )
    answering = Answering(max_new_tokens, min_new_tokens, tuple(ends), gap)
    wanted = [spans] if isinstance(spans, Span) else spans
    comparison = _Comparison(context, wanted, question, erased, answering, errata, repeats, new)
    teacher = FullRecompute()
    exact = comparison.see(teacher, None)
    results = []
    for method in methods:
        seen = exact if method == teacher else comparison.see(method, exact.said)
        margin = None if seen.erased is None or exact.erased is None else seen.erased - exact.erased
        label = method_label(method)
        result = MethodResult(
            method=label,
            used=label if seen.receipt.method == method.name else seen.receipt.method,
            answer=context.decode(seen.said).strip(),
            exact=seen.receipt.exact,
            tokens_recomputed=seen.receipt.tokens_recomputed + len(comparison.line(method)),
            residual=seen.receipt.residual,
            milliseconds=1000 * seen.seconds,
            kl=max(kl_divergence(exact.logits, seen.logits).mean().item(), 0.0),
            agreement=agreement(exact.logits, seen.logits),
            leak_margin=margin,
            recall=seen.recall,
        )
        results.append(result)
        if done:
            done(result)
    return results
