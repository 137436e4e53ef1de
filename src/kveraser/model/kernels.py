"""Which of PyTorch's fused attention kernels our forwards use.

Knows: PyTorch's switches. Does not know about models.

PyTorch prefers cuDNN's kernels on Hopper. With a mask, which all but a plain prefill has, these

- build a plan for every new shape (some 65 ms a forward on an H200), and erases and the chunks of a prefill hardly ever repeat one;
- have given NaN gradients where a row's scores are all low, as in Qwen2.5's heads with large key biases (PyTorch issue 196678).

The other kernels do neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from torch.backends import cuda


class _Switch:
    """Off while anyone, in any thread, wants it off; then as it was before."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = Lock(), 0, True

    def off(self) -> None:
        with self._lock:
            if not self._users:
                self._before = cuda.cudnn_sdp_enabled()
                cuda.enable_cudnn_sdp(False)
            self._users += 1

    def back(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                cuda.enable_cudnn_sdp(self._before)


_cudnn = _Switch()


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Forwards in the block (and backwards through them, wherever) take other attention kernels than cuDNN's."""
    _cudnn.off()
    try:
        yield
    finally:
        _cudnn.back()
