"""Errors in OpenAI's format: what is answered, and what is not told."""

from __future__ import annotations

import logging
import threading
import time

import pytest
from serving_helpers import servers


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def test_what_is_no_route_or_no_json_is_an_error_in_the_same_format(serve):
    server = serve()
    for reply in (
        server.call("GET", "/nowhere"),
        server.call("PUT", "/v1/models"),
        server.call("POST", "/v1/completions", content="{", headers={"content-type": "application/json"}),
    ):
        assert 400 <= reply.status_code < 500
        assert reply.json()["error"]["message"]


def test_a_full_queue_is_answered_with_429_and_when_to_come_back(serve):
    server = serve(queue_size=1)
    gate = threading.Event()
    server.service.submit(lambda job: gate.wait(10))
    while server.service.worker.waiting:
        time.sleep(0.001)
    waiting = server.service.submit(lambda job: None)
    reply = server.chat()
    gate.set()
    waiting.future.result(10)  # its place in the queue is free again
    assert reply.status_code == 429
    assert int(reply.headers["retry-after"]) >= 1
    assert server.chat(stream=True).status_code == 200


def test_a_request_that_takes_too_long_gets_408(serve):
    reply = serve(timeout=0.05).chat(max_tokens=5000)
    assert reply.status_code == 408
    assert reply.headers["x-should-retry"] == "false"  # else OpenAI's clients let it run three times


def test_no_prompt_reaches_a_log_not_even_with_a_mistake_of_ours(serve, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    server = serve()
    assert server.chat([("user", "xylophone quartz")]).status_code == 200

    def fail(*_):
        raise RuntimeError("xylophone quartz")

    monkeypatch.setattr(server.service, "complete", fail)
    reply = server.chat([("user", "xylophone quartz")])
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert reply.headers["x-should-retry"] == "false"
    assert "unexpected RuntimeError" in caplog.text
    assert "xylophone" not in caplog.text + reply.text
