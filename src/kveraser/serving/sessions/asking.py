"""Questions to a session.

Knows: sessions, generation. Does not know about HTTP or JSON. A session stays as it is, unless a reply is to be kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from kveraser.cache import cache_length
from kveraser.serving.completion import ReuseReport
from kveraser.serving.decoding import Sampling
from kveraser.serving.sessions.comparing import Comparison, Event, Question, compare
from kveraser.serving.sessions.sessions import Sessions
from kveraser.serving.sessions.watching import Watcher
from kveraser.serving.worker import Job


@dataclass(frozen=True)
class SessionReply:
    """A reply within a session."""

    text: str
    prompt_tokens: int
    reuse: ReuseReport


def ask(
    sessions: Sessions,
    owner: str,
    name: str,
    prompt: str | None,
    sampling: Sampling,
    keep: bool,
    job: Job,
    emit: Callable[[str], None] | None = None,
) -> SessionReply:
    """Ask within a session; it stays as it is unless `keep`.

    Args:
        emit: called with the text as it comes.
    """
    held, started = sessions.get(owner, name), time.perf_counter()
    context = held.context
    asked = sessions.count_tokens(held, prompt) if prompt else 1
    sessions.fit(held, asked + sampling.max_tokens)
    assert context.tokenizer is not None
    watch = Watcher(job, context.tokenizer, emit)
    before, exact = cache_length(context.cache), held.exact
    given = len(context.prompt_ids(prompt))
    with sessions.saved(held, whole=False) if keep else nullcontext():
        text = context.reply(prompt, sampling, max_new_tokens=sampling.max_tokens, keep=keep, watch=watch)
    watch.finish()
    run = given or 1
    report = ReuseReport(
        method="prefix",
        exact=exact,
        reason="continued",
        spans=(),
        tokens_reused=before + given - run,
        tokens_recomputed=run,
        seconds=watch.first - started,
        residual=0.0 if exact else None,
    )
    return SessionReply(text, before + given, report)


def compare_versions(
    sessions: Sessions,
    owner: str,
    name: str,
    question: Question,
    job: Job,
    emit: Callable[[Event], None] | None = None,
) -> Comparison:
    """Ask before the erases of a session, now, and after recomputing; the session stays as it is.

    Args:
        emit: called with what happens as it happens.
    """
    held = sessions.get(owner, name)
    more = sessions.count_tokens(held, question.prompt) + question.max_tokens
    more += sum(map(len, held.context.erased))  # which a method may have removed
    sessions.fit(held, more, copies=2)
    return compare(held.context, question, job, emit)
