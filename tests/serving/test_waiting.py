"""Waiting for the worker, and stopping when nobody waits any more."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from serving_helpers import servers

from kveraser.errors import JobCancelledError
from kveraser.serving.waiting import first_of


def test_a_client_that_goes_away_before_the_first_event_stops_the_work():
    closed = []

    async def events():
        try:
            await asyncio.sleep(60)
            yield 1
        finally:
            closed.append(True)

    class Gone:
        async def is_disconnected(self):
            return True

    with pytest.raises(JobCancelledError):
        asyncio.run(first_of(Gone(), events()))
    assert closed


def test_a_request_that_waits_too_long_gets_its_408_on_time_and_not_at_its_turn():
    with servers() as make:
        server, gate = make(timeout=0.3), threading.Event()
        busy = server.service.submit(lambda job: gate.wait(20))
        for options in ({}, {"stream": True}):
            started = time.monotonic()
            assert server.chat(**options).status_code == 408
            assert time.monotonic() - started < 5
        assert server.call("GET", "/v1/sessions").status_code == 408
        assert not busy.future.done()
        gate.set()
