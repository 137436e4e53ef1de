"""A linear layer with a LoRA beside it, on the first tokens only if so wished.

Knows: LoRA's arithmetic. Does not know about erasers or files.

PEFT builds and names the matrices; this layer runs them. It does less per call than PEFT's own, which matters in a pass
over few tokens (seven such layers per transformer layer), and it can leave later tokens of a row to the plain model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kveraser.model.view import shallow


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
        self.alone = False

    def for_first(self, tokens: int) -> LoraLinear:
        """The same layer, for the first so many tokens of every row."""
        layer = shallow(self)
        layer.__dict__["first"] = tokens
        return layer

    def by_itself(self) -> LoraLinear:
        """The same layer without what the plain one makes of the tokens that it changes: `scaling * x A^T B^T`."""
        layer = shallow(self)
        layer.__dict__["alone"] = True
        return layer

    def forward(self, hidden: Tensor) -> Tensor:
        """From `(..., tokens, in)` to `(..., tokens, out)`."""
        result: Tensor = self.base_layer(hidden)  # type: ignore[operator]
        changed, into = hidden, result
        if self.first is not None:
            changed, into = hidden[..., : self.first, :], result[..., : self.first, :]
        rows = changed.flatten(0, -2).to(self.down.dtype)  # a slice of a batch is multiplied slowly
        inner = F.linear(rows, self.down)
        if torch.is_grad_enabled():
            added = (F.linear(inner, self.up).view(into.shape) * self.scaling).to(result.dtype)
            into = added if self.alone else into + added
            return into if self.first is None else torch.cat([into, result[..., self.first :, :]], -2)
        if self.alone:
            into.zero_()
        if into.is_contiguous() and into.dtype == inner.dtype:
            into.view(rows.shape[0], -1).addmm_(inner, self.up.t(), alpha=self.scaling)
        else:
            into.add_(F.linear(inner, self.up).view(into.shape), alpha=self.scaling)
        return result
