"""A linear layer with a LoRA beside it, on the first tokens only if so wished.

Knows: LoRA's arithmetic. Does not know about erasers or files.

PEFT builds and names the matrices; this layer runs them. It does less per call than PEFT's own, which matters in a pass
over few tokens (seven such layers per transformer layer), and it can leave later tokens of a row to the plain model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kveraser.model_view import shallow


class LoraLinear(nn.Module):
    """`base_layer(x) + scaling * x A^T B^T`; `base_layer` is the plain layer that a view puts there.

    Args:
        down: LoRA A, `(rank, in)`.
        up: LoRA B, `(out, rank)`.
        scaling: alpha / rank.
    """

    def __init__(self, down: nn.Parameter, up: nn.Parameter, scaling: float) -> None:
        super().__init__()
        self.down, self.up, self.scaling = down, up, scaling
        self.first: int | None = None

    def for_first(self, tokens: int) -> LoraLinear:
        """The same layer, for the first so many tokens of every row."""
        layer = shallow(self)
        layer.__dict__["first"] = tokens
        return layer

    def forward(self, hidden: Tensor) -> Tensor:
        """From `(..., tokens, in)` to `(..., tokens, out)`."""
        result: Tensor = self.base_layer(hidden)  # type: ignore[operator]
        changed = hidden if self.first is None else hidden[..., : self.first, :]
        rows = changed.flatten(0, -2).to(self.down.dtype)  # a slice of a batch is multiplied slowly
        added = F.linear(F.linear(rows, self.down), self.up).view(*changed.shape[:-1], -1)
        if torch.is_grad_enabled():
            added = (added * self.scaling).to(result.dtype)
            if self.first is None:
                return result + added
            return torch.cat([result[..., : self.first, :] + added, result[..., self.first :, :]], -2)
        result[..., : added.shape[-2], :].add_(added, alpha=self.scaling)
        return result
