"""Metrics: they are those of the service, and reading them never meets the worker at work."""

from __future__ import annotations

import threading

import pytest
from serving_helpers import TALK, servers

from kveraser.serving.contexts.store import ContextStore


@pytest.fixture
def serve():
    with servers() as make:
        yield make


def values(server):
    reply = server.call("GET", "/metrics")
    assert reply.status_code == 200
    lines = [line.rsplit(" ", 1) for line in reply.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_the_numbers_are_those_of_the_store_as_soon_as_a_request_is_answered(serve):
    server = serve(cache_budget=200_000)
    for number in range(12):
        assert server.chat([("user", f"{number} {TALK[4][1]}")]).status_code == 200
        found, store = values(server), server.service.store
        assert found["kveraser_cache_bytes"] == store.bytes
        assert (found["kveraser_contexts_in_memory"], found["kveraser_contexts_on_disk"]) == store.count
    assert found["kveraser_contexts_on_disk"] > 0
    assert found["kveraser_cache_budget_bytes"] == 200_000


def test_only_the_workers_thread_looks_into_the_store(serve, monkeypatch):
    server, seen = serve(), set()
    for name in ("bytes", "count"):
        inner = getattr(ContextStore, name).fget

        def watched(store, inner=inner):
            seen.add(threading.current_thread().name)
            return inner(store)

        monkeypatch.setattr(ContextStore, name, property(watched))
    assert server.chat(TALK).status_code == 200
    values(server)
    assert seen == {"kveraser-worker"}


def test_metrics_are_answered_while_the_worker_is_busy_and_contexts_come_and_go(serve):
    server = serve()
    done = threading.Event()

    def busy(job):
        while not done.is_set():
            held = [server.service.store.new("", is_session=False) for _ in range(50)]
            for each in held:
                server.service.store.drop(each)

    job = server.service.submit(busy)
    try:
        for _ in range(40):
            values(server)
    finally:
        done.set()
        job.future.result(10)
