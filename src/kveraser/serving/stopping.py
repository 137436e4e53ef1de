"""Stopping a pass of a model in the middle, when nobody waits for its result any more.

Knows: torch's function modes. Does not know what the work is, nor who waits.

What is stopped sees an exception in the middle of a pass, as from Ctrl-C: contexts are as they were then. The mode sees every call
of torch, which makes decoding token by token a seventh slower, so that is stopped between tokens instead (`decoding`, `sessions/watching`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from kveraser.serving.worker import Job

T = TypeVar("T")


class _StopsAtLayers(TorchFunctionMode):
    """Calls `check` at every linear layer: that is within a pass, never where states are put into place."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self._check = check

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self._check()
        return func(*args, **(kwargs or {}))


def stoppable(work: Callable[[Job], T]) -> Callable[[Job], T]:
    """Work whose passes end when the job is cancelled or has taken too long."""

    def watched(job: Job) -> T:
        with _StopsAtLayers(job.check):
            return work(job)

    return watched
