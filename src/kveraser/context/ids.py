"""A growing list of token ids in one tensor.

Knows: integers. Does not know what the ids mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class IdBuffer:
    """Token ids with amortised appending and views without copies."""

    def __init__(self, ids: Sequence[int] | Tensor = (), device: torch.device | str = "cpu") -> None:
        self._buffer = torch.as_tensor(ids, dtype=torch.long, device=device).clone()
        self._length = len(self._buffer)

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> Tensor:
        """All ids, `(tokens,)`; a view."""
        return self._buffer[: self._length]

    def append(self, ids: Tensor) -> None:
        """Add ids at the end."""
        end = self._length + len(ids)
        if end > len(self._buffer):
            grown = self._buffer.new_zeros(max(end, 2 * len(self._buffer), 256))
            grown[: self._length] = self.view
            self._buffer = grown
        self._buffer[self._length : end] = ids
        self._length = end

    def truncate(self, length: int) -> None:
        """Keep the first `length` ids; the others are overwritten."""
        self._buffer[length:] = 0
        self._length = min(self._length, length)
