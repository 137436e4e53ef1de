"""Probes: what the query of a token was, told from the keys and values that are in the cache.

Knows: linear regression, rotary embeddings, query norms. Does not know about spans or attention.

Keys, values and queries of a layer are linear in the same normalised hidden state, so a ridge regression from cached keys
(turned back to position 0) and values to queries recovers most of these without a pass of the model. With the layers next
to it as further sources it recovers nearly all: 91 to 98 % of the variance on three models. Where a model normalises its
queries, what goes into the norm is regressed, and the model's own norm applied. Each map is kept at low rank. The idea is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kveraser.model.rope import Rotation, frequencies, has_rotary, rotary_layout
from kveraser.model.view import text_config
from kveraser.readers.observing import Observed, query_norms

_RIDGE = 1e-3
_HELD_OUT = 5
"""Every fifth token is kept out of a fit, to judge it by."""
_TINY = 1e-6


class Turning:
    """How a model rotates, for the probes: queries forward to their positions, keys back to position 0.

    Args:
        rotary: per layer, whether it rotates; None: none does.
        pairing, inv_freq: as of `Rotation`.
    """

    def __init__(self, rotary: tuple[bool, ...] | None, pairing: str, inv_freq: Tensor) -> None:
        self.rotary, self.pairing, self.inv_freq = rotary, pairing, inv_freq

    @classmethod
    def of(cls, model: nn.Module) -> Turning:
        """As a transformers model does."""
        if not has_rotary(model):
            return cls(None, "", torch.empty(0))
        layout = rotary_layout(model)
        return cls(layout.rotary, layout.pairing, frequencies(model))

    @property
    def slowest(self) -> float:
        """Radians per position of the slowest rotary dimension."""
        return float(self.inv_freq.min()) if self.rotary is not None else 1e-9

    def at(self, positions: Tensor) -> Turns:
        """The turns of tokens at `(tokens,)` positions."""
        if self.rotary is None:
            return Turns(None, None, ())
        forward = Rotation(positions[None], self.inv_freq, self.pairing)
        return Turns(forward, forward.inverse(), self.rotary)


@dataclass(frozen=True)
class Turns:
    """Rotations of some tokens; layers without rotary leave states as they are. States: `(heads, tokens, head_dim)`."""

    forward: Rotation | None
    back: Rotation | None
    rotary: tuple[bool, ...]

    def to_place(self, states: Tensor, layer: int) -> Tensor:
        """Turned from position 0 to where the tokens are."""
        return states if self.forward is None or not self.rotary[layer] else self.forward(states[None])[0]

    def to_origin(self, states: Tensor, layer: int) -> Tensor:
        """Turned from where the tokens are to position 0."""
        return states if self.back is None or not self.rotary[layer] else self.back(states[None])[0]


def features(layers: Sequence[Any], sources: Sequence[int], row: int, slots: Tensor | slice, turns: Turns) -> Tensor:
    """What probes read: keys at position 0 and values of the source layers, `(tokens, features)` float32.

    Args:
        layers: of the cache.
        slots: the tokens that `turns` is of.
    """
    parts = []
    for layer in sources:
        keys, values = (states[row][:, slots] for states in (layers[layer].keys, layers[layer].values))
        parts += [turns.to_origin(keys.float(), layer), values.float()]
    return torch.cat([part.transpose(0, 1).flatten(1) for part in parts], -1)


@dataclass(frozen=True)
class Probe:
    """The queries of one layer from keys and values: `((features - mean) / scale) @ down @ up + bias`, then the norm.

    Attributes:
        layer: whose queries.
        sources: layers whose keys and values are read.
        heads: how many query heads it tells.
        scaling: of the layer's attention scores.
        mean, scale: `(features,)` float32.
        down, up, bias: `(features, rank)`, `(rank, outputs)`, `(outputs,)`.
        explained: share of the queries' variance that it explains, on tokens that it was not fitted to.
        key_heads: where only some of the query heads are told: the key head of each.
    """

    layer: int
    sources: tuple[int, ...]
    heads: int
    scaling: float
    mean: Tensor
    scale: Tensor
    down: Tensor
    up: Tensor
    bias: Tensor
    explained: float
    key_heads: tuple[int, ...] | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Probe:
        """The probe with matrices of that type, for use."""
        kept = {name: getattr(self, name).to(device, torch.float32) for name in ("mean", "scale", "bias")}
        maps = {name: getattr(self, name).to(device, dtype) for name in ("down", "up")}
        return replace(self, **kept, **maps)

    def queries(self, read: Tensor, turns: Turns, norm: Any, norm_shape: tuple[int, ...]) -> Tensor:
        """The queries of tokens as their layer uses them, `(heads, tokens, head_dim)` float32.

        Args:
            read: `features` of the tokens.
            norm: the layer's query norm, if it has one, and the shape (without tokens) of what goes into it.
        """
        inner = (read.sub(self.mean).div_(self.scale)).to(self.down.dtype) @ self.down
        found = (inner @ self.up).float().add_(self.bias)
        if norm is not None:
            weight = next(norm.parameters(), found) if isinstance(norm, nn.Module) else found
            shape = (self.heads, norm_shape[1]) if len(norm_shape) == 2 else norm_shape
            found = norm(found.view(1, -1, *shape).to(weight.dtype))[0].float()
        return turns.to_place(found.reshape(len(read), self.heads, -1).transpose(0, 1), self.layer)


@dataclass(frozen=True)
class Target:
    """What a probe of one layer is to predict: `(tokens, outputs)`, the queries or what goes into their norm."""

    outputs: Tensor
    queries: Tensor
    scaling: float
    norm: Any
    norm_shape: tuple[int, ...]

    @classmethod
    def of(cls, norm: Any, norm_shape: tuple[int, ...], seen: Observed, layer: int, turns: Turns) -> Target:
        """From an observed forward, and the layer's query norm."""
        found = seen.layers[layer]
        queries = found.queries.float()
        if layer in seen.unnormed:
            return cls(seen.unnormed[layer].float().flatten(1), queries, found.scaling, norm, norm_shape)
        outputs = turns.to_origin(queries, layer).transpose(0, 1).flatten(1)
        return cls(outputs, queries, found.scaling, None, ())

    def of_heads(self, heads: Sequence[int]) -> Target:
        """That of some query heads alone; all of them where a norm takes them together."""
        if self.norm is not None and len(self.norm_shape) == 1:
            return self
        some = torch.tensor(list(heads), device=self.queries.device)
        outputs = self.outputs.view(len(self.outputs), self.queries.shape[0], -1)[:, some].flatten(1)
        return replace(self, outputs=outputs, queries=self.queries[some])


def fit_probe(read: Tensor, target: Target, layer: int, sources: tuple[int, ...], rank: int, turning: Turning,
              positions: Tensor) -> Probe:  # fmt: skip
    """Fit one probe.

    Args:
        read: `(tokens, features)`, from `features`.
        rank: of the map.
        positions: `(tokens,)`, where the tokens are.
    """
    count = len(read)
    held = torch.arange(count, device=read.device) % _HELD_OUT == _HELD_OUT - 1
    mean = read[~held].mean(0)
    scale = read[~held].std(0).clamp(min=_TINY)
    inputs, outputs = ((read - mean) / scale)[~held], target.outputs[~held]
    bias = outputs.mean(0)
    weights = _ridge(inputs, outputs - bias)
    fitted = inputs @ weights
    _, directions = torch.linalg.eigh(fitted.T @ fitted)  # in ascending order
    up = directions.flip(1)[:, : min(rank, *weights.shape)].T.contiguous()
    heads = target.queries.shape[0]
    probe = Probe(layer, sources, heads, target.scaling, mean, scale, weights @ up.T, up, bias, explained=0.0)
    guess = probe.queries(read[held], turning.at(positions[held]), target.norm, target.norm_shape)
    truth = target.queries[:, held]
    left = (truth - guess).pow(2).sum() / (truth - truth.mean(1, keepdim=True)).pow(2).sum().clamp(min=_TINY)
    return replace(probe, explained=1 - float(left))


def _ridge(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Weights `(features, outputs)`; solved in whichever of both sizes is smaller."""
    count, width = inputs.shape
    penalty = _RIDGE * count
    if width <= count:
        gram = inputs.T @ inputs
        gram.diagonal().add_(penalty)
        found: Tensor = torch.linalg.solve(gram, inputs.T @ outputs)
        return found
    gram = inputs @ inputs.T
    gram.diagonal().add_(penalty)
    dual: Tensor = torch.linalg.solve(gram, outputs)
    return inputs.T @ dual


def norm_of(model: nn.Module, layer: int) -> tuple[nn.Module | None, tuple[int, ...]]:
    """The query norm of a layer, and the shape of what goes into it for one token."""
    norm = query_norms(model).get(layer, (None, None))[1]
    if norm is None:
        return None, ()
    config = text_config(model)
    weight = next(norm.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    return norm, (heads, head_dim) if weight.shape[-1] == head_dim else (heads * head_dim,)
