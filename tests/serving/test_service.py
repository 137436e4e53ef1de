"""Answering a prompt: what is cancelled, what takes too long."""

from __future__ import annotations

import pytest
from serving_helpers import TALK, ask, chat_ids, fresh

from kveraser.errors import JobCancelledError, JobTimeoutError
from kveraser.serving.completion import Prompt
from kveraser.serving.decoding import Sampling


def test_a_cancelled_request_leaves_a_context_that_goes_on(make_service):
    service = make_service()
    prompt = Prompt("", chat_ids(TALK), "exact", Sampling(max_tokens=200))

    def leave(piece, reply, job):
        if reply.completion_tokens == 3:
            job.cancel()

    job = service.submit(lambda job: service.complete(prompt, job, lambda piece, reply: leave(piece, reply, job)))
    with pytest.raises(JobCancelledError):
        job.future.result(20)
    reply = ask(service, TALK)
    assert reply.reuse.tokens_reused == reply.prompt_tokens - 1
    assert reply.text == fresh(make_service, TALK).text


def test_a_request_that_takes_too_long_is_ended(make_service):
    service = make_service(timeout=0.05)
    with pytest.raises(JobTimeoutError):
        ask(service, TALK, max_tokens=3000)
