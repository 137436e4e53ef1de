"""Waiting for the worker, and stopping when nobody waits any more."""

from __future__ import annotations

import asyncio

import pytest

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
