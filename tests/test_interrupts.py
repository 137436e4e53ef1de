"""Ctrl-C waits for the end of a block that must not be cut in two."""

from __future__ import annotations

import signal
import threading

import pytest

from kveraser.interrupts import uninterrupted


@pytest.fixture(autouse=True)
def _python_handles_ctrl_c():
    """Also where the tests themselves run in the background, with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_is_delivered_when_the_block_is_done():
    steps = []

    def interrupted_work():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            steps.append("finished")

    with pytest.raises(KeyboardInterrupt):
        interrupted_work()
    assert steps == ["finished"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_have_nothing_to_hold_back():
    seen = []

    def work():
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
