"""What stands in for a cache while tokens run through a model: layers that show chosen slots, and the mask that hides others.

Knows: transformers' cache layers and 4-D masks. Does not know which slots a pass writes, or what for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class StandInLayer(DynamicLayer):
    """In the place of one layer of a cache, for one forward.

    Args:
        seen: slots that are visible before the tokens of the pass.
    """

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen, self.is_initialized = seen, True

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores so that only what is `visible` (bool, of the same shape) is attended to."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)
