"""A start close to neutral: steering states that later tokens hardly attend to.

Knows: key and query projections, rotary frequencies, linear algebra. Does not know about losses or optimisers.

A fresh LoRA changes nothing: its steering states are the span's own, and training first has to learn that they must
go. But what attends to them is known beforehand. The queries of a head point, on the whole, in one direction (it is
what attention sinks live on), and in the slow rotary dimensions that direction hardly depends on the position. So a
constant offset of the keys against it lowers the attention to the slots by a given factor in every head, whatever the
question. Normalised hidden states have a nearly constant part, too, which makes that offset one rank of a LoRA on the
key projection: row `a` of A with `a . x = 1`, column `b` of B with `q . b / sqrt(head_dim) = -nats`, both by ridge
regression on a few hundred tokens. Training starts from there with all its ranks, this one among them. The idea is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kveraser.eraser import KVEraser
from kveraser.model.rope import frequencies, rotary_layout
from kveraser.model.view import causal_lm, decoder, kv_shape, model_device, text_config, view

_REACH = 2048
"""Positions over which a dimension must turn by less than `_SLOW` radians to count as slow."""
_SLOW = 0.5
_SINK = 4
"""First tokens of a text, which are unlike all others."""
_RIDGE = 1e-2
_TINY = 1e-9


class _Recorder(nn.Module):
    """Stands before a projection in a view of the model, and keeps what goes in and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        result: Tensor = self.base_layer(hidden)  # type: ignore[operator]
        self.inputs.append(hidden[0, _SINK:].double().cpu())
        self.outputs.append(result[0, _SINK:].double().cpu())
        return result


@torch.no_grad()
def hide(eraser: KVEraser, model: nn.Module, texts: Iterable[Sequence[int]], nats: float) -> bool:
    """Set rank 0 of the eraser's key projections so that attention to what it makes is lower by about `exp(-nats)`.

    Args:
        eraser: a fresh one; changed in place.
        model: its backbone.
        texts: ids of some texts, a few hundred tokens in all.
        nats: how much lower the attention scores become.

    Returns:
        Whether it was possible. It is not for models whose keys and queries come from one projection, or are
        normalised behind it; their eraser is left as it is.
    """
    names = {name.removesuffix(".k_proj") for name in eraser.layers if name.endswith(".k_proj")}
    base = causal_lm(model)
    modules = dict(base.named_modules())
    if not names or any(f"{name}.q_proj" not in modules or hasattr(modules[name], "k_norm") for name in names):
        return False
    recorders = {f"{name}.q_proj": _Recorder() for name in names}
    recording = decoder(view(base, recorders))
    for ids in texts:
        recording(input_ids=torch.tensor([list(ids)], device=model_device(model)), use_cache=False)
    heads, groups = text_config(model).num_attention_heads, kv_shape(model)[1]
    slow = _slow_dimensions(model)
    for index, name in enumerate(sorted(names, key=lambda entry: [int(p) for p in entry.split(".") if p.isdigit()])):
        recorder = recorders[f"{name}.q_proj"]
        inputs, queries = torch.cat(recorder.inputs), torch.cat(recorder.outputs)
        row = _one_for_all(inputs)
        means = queries.mean(0).view(groups, heads // groups, -1) * slow[index]
        column = torch.cat([_against(mean, nats) for mean in means])
        down, up, scaling = eraser.matrices(f"{name}.k_proj")
        down.data[0] = row.to(down)
        up.data[:, 0] = (column / scaling).to(up)
    return True


def _one_for_all(inputs: Tensor) -> Tensor:
    """A vector whose product with every input is about 1.

    Args:
        inputs: `(tokens, hidden)`.
    """
    second = inputs.T @ inputs / len(inputs)
    ridge = _RIDGE * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)
    found: Tensor = torch.linalg.solve(second + ridge, inputs.mean(0))
    return found / (inputs @ found).mean()


def _against(means: Tensor, nats: float) -> Tensor:
    """The shortest key offset that lowers the score of each head's mean query by `nats`.

    Args:
        means: `(heads of a group, head_dim)`.
    """
    products = means @ means.T
    ridge = (10 * _RIDGE * products.diagonal().mean() + _TINY) * torch.eye(len(products), dtype=products.dtype)
    wanted = torch.full((len(means),), -nats * math.sqrt(means.shape[1]), dtype=means.dtype)
    offset: Tensor = means.T @ torch.linalg.solve(products + ridge, wanted)
    return offset


def _slow_dimensions(model: nn.Module) -> list[Tensor]:
    """Per layer, `(head_dim,)` ones where a dimension of the keys hardly turns over `_REACH` positions (the slowest do)."""
    head_dim = kv_shape(model)[2]
    layout, speed = rotary_layout(model), frequencies(model).double().cpu()
    pairs = (speed <= max(_SLOW / _REACH, float(speed.min()))).double()
    turning = torch.cat([pairs, pairs]) if layout.pairing == "halves" else pairs.repeat_interleave(2)
    mask = torch.cat([turning, torch.ones(head_dim - len(turning), dtype=torch.float64)])
    return [mask if rotary else torch.ones_like(mask) for rotary in layout.rotary]
