"""The same question before the erases of a session, now, and after full recomputation.

Knows: contexts, greedy answers. Does not know about HTTP or where sessions are kept. The session is only
run ahead of, which leaves it as it is, bit for bit; the other two answers come from a scratch copy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kveraser.cache import get_marks
from kveraser.context import ErasableContext
from kveraser.errors import ContextError
from kveraser.serving.sessions.distributions import Distributions, Version, distributions
from kveraser.serving.sessions.watching import Watcher
from kveraser.serving.worker import Job

Event = dict[str, Any]

LOOK = 32
"""Answer tokens whose distributions are looked at."""


@dataclass(frozen=True)
class Question:
    """What is asked of every version.

    Attributes:
        prompt: a user's message if the session is a chat, else text as it is.
        max_tokens: at most so many per answer.
        first_line: end every answer with its first line that is not blank.
        top: the most likely tokens to report of every version.
    """

    prompt: str
    max_tokens: int = 32
    first_line: bool = False
    top: int = 5


@dataclass(frozen=True)
class VersionAnswer:
    """One version's greedy answer.

    Attributes:
        version: `before` (nothing erased), `now` (the session as it is), `recomputed` (what is live, read afresh).
        exact: whether the context equals a fresh prefill of what it holds.
        methods: of the erases that are in effect.
        edit_seconds: of these erases, or of recomputing; None before.
        first_seconds: from the question to the first token.
        seconds: from the question to the end.
        text, tokens: the answer, and its length.
    """

    version: Version
    exact: bool
    methods: tuple[str, ...]
    edit_seconds: float | None
    first_seconds: float
    seconds: float
    text: str
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """What came out. Where nothing is erased, there is `now` alone."""

    answers: tuple[VersionAnswer, ...]
    distributions: Distributions


@dataclass(frozen=True)
class _Said:
    """An answer with its ids, and the logits `(vocab,)` that gave the first of them."""

    answer: VersionAnswer
    ids: list[int]
    rows: list[Tensor]


def compare(
    context: ErasableContext, question: Question, job: Job, emit: Callable[[Event], None] | None = None
) -> Comparison:
    """Ask the same before the erases, now, and after recomputing; the context stays as it is.

    Args:
        emit: called as it comes with `{version, done, total}` (tokens of a copy read), `{version, text}` (more of an
            answer), and `{version, answer}` (what else there is to say of it).

    Raises:
        ContextError: an empty context, a chat's question without content.
        JobCancelledError, JobTimeoutError: nobody waits any more.
    """
    tell = emit or (lambda event: None)
    if len(context) == 0:
        raise ContextError("the session is empty; append something before asking")
    ids = context.prompt_ids(question.prompt)

    def ask(version: Version, asked: ErasableContext, methods: tuple[str, ...], seconds: float | None) -> _Said:
        said = _answer(version, asked, ids, question, methods, seconds, job, tell)
        tell({"version": version, "answer": said.answer})
        return said

    everything, shared = _before(context)
    live = context.live_ids
    if shared is None:
        return _compared(context, [ask("now", context, (), None)], question.top)
    known = get_marks(context.cache).approximate_from
    kept = shared if known is None else min(shared, known)
    scratch = context.prefix(kept)
    _read(scratch, everything[kept:], "before", job, tell)
    before = ask("before", scratch, (), None)
    edits = [receipt for receipt in context.receipts if receipt.tokens_removed]
    methods = tuple(dict.fromkeys(receipt.method for receipt in edits))
    now = ask("now", context, methods, sum(receipt.seconds for receipt in edits))
    started = time.perf_counter()
    scratch = scratch.prefix(shared, take=True)
    _read(scratch, live[shared:], "recomputed", job, tell)
    recomputed = ask("recomputed", scratch, ("full-recompute",), time.perf_counter() - started)
    return _compared(context, [before, now, recomputed], question.top)


def _before(context: ErasableContext) -> tuple[list[int], int | None]:
    """The ids before the edits that can be undone, and how many of them are before the first of these; None where nothing was edited."""
    new = [span for receipt in context.receipts if receipt.tokens_removed for span in receipt.replacements]
    ids, shared = list[int](), None
    for run, live in context.runs:
        said, is_new = context.ids_of(run), any(run.overlaps(span) for span in new)
        if said and (is_new or not live):
            shared = len(ids) if shared is None else shared
        ids += [] if is_new else said
    return ids, shared


def _compared(context: ErasableContext, said: list[_Said], top: int) -> Comparison:
    answers = tuple(one.answer for one in said)
    versions = [answer.version for answer in answers]
    found = distributions(context, versions, [one.ids for one in said], [one.rows for one in said], top)
    return Comparison(answers, found)


def _read(scratch: ErasableContext, ids: list[int], version: Version, job: Job, tell: Callable[[Event], None]) -> None:
    """Have a scratch context read more, a chunk at a time."""
    chunk = scratch.backend.chunk
    for at in range(0, len(ids), chunk):
        tell({"version": version, "done": at, "total": len(ids)})
        job.check()
        scratch.append_ids(ids[at : at + chunk])
    tell({"version": version, "done": len(ids), "total": len(ids)})


def _answer(
    version: Version, context: ErasableContext, ids: list[int], question: Question, methods: tuple[str, ...],
    edit_seconds: float | None, job: Job, tell: Callable[[Event], None],
) -> _Said:  # fmt: skip
    assert context.tokenizer is not None
    started = time.perf_counter()
    watch = Watcher(
        job, context.tokenizer, lambda text: tell({"version": version, "text": text}),
        first_line=question.first_line, keep=LOOK,
    )  # fmt: skip
    said = context.reply_ids(ids, max_new_tokens=question.max_tokens, min_new_tokens=1, watch=watch)
    watch.finish()
    answer = VersionAnswer(
        version=version,
        exact=context.exact,
        methods=methods,
        edit_seconds=edit_seconds,
        first_seconds=watch.first - started,
        seconds=time.perf_counter() - started,
        text=context.decode(said),
        tokens=len(said),
    )
    return _Said(answer, said, watch.rows)
