"""Making a few lines atomic with respect to Ctrl-C.

Knows: Python's signal handling. Does not know what the lines do.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back a KeyboardInterrupt until the block is done, then deliver it.

    For the short blocks that commit an edit or roll it back. Python delivers signals to the main thread only, so in
    any other thread there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if previous is None:  # installed by non-Python code: it cannot be put back, so it is left alone
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: held.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held and callable(previous):
            previous(*held[0])
