"""Moving rotated keys to other positions.

Knows: rotary position embeddings as transformers' models apply them. Does not know about caches, spans or erasing.

A rotary embedding turns each pair of a key's dimensions by `position * frequency`. Turning a cached key further by
`delta * frequency` is therefore the same as having computed it `delta` positions later. The attention scaling that YaRN
multiplies into cos and sin is already in the cached key and must not be applied again: only the frequencies are used.

Which dimensions form a pair (halves, or neighbors), how many are rotary at all, and whether a layer is rotary at all
(some have none), is read off the model itself: one token at two positions has, in every layer, the same hidden state
(it attends only to itself), so its two keys differ by the rotation alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.cache_utils import DynamicCache

from kveraser.errors import UnsupportedCacheError
from kveraser.model.kernels import without_cudnn
from kveraser.model.view import causal_lm, decoder, evaluating, model_device

_PROBE_POSITION = 37
_HALVES, _NEIGHBORS = "halves", "neighbors"


@dataclass(frozen=True)
class RotaryLayout:
    """How one model rotates its keys.

    Attributes:
        pairing: "halves" (dimension i with i + rotary/2) or "neighbors" (2i with 2i + 1).
        rotary: per layer, whether its keys are rotated.
    """

    pairing: str
    rotary: tuple[bool, ...]


_layouts = WeakIdKeyDictionary()
"""Input embedding (views of a model share it) -> its `RotaryLayout`."""


def has_rotary(model: nn.Module) -> bool:
    """Whether the model has rotary frequencies at all."""
    return any(isinstance(getattr(module, "inv_freq", None), Tensor) for module in causal_lm(model).modules())


def frequencies(model: nn.Module) -> Tensor:
    """The model's rotary frequencies, `(rotary_dim / 2,)` float32, in radians per position, scaling included.

    Raises:
        UnsupportedCacheError: the model has none (absolute or ALiBi positions), or several sets.
    """
    found: list[Tensor] = [
        module.inv_freq
        for module in causal_lm(model).modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    if not found:
        raise UnsupportedCacheError(
            f"{type(causal_lm(model)).__name__} has no rotary position embedding, so tokens cannot be moved; "
            "use full-recompute or kveraser, which leave every position as it is or compute it anew"
        )
    if any(other.shape != found[0].shape or not torch.equal(other, found[0]) for other in found[1:]):
        raise UnsupportedCacheError(
            f"{type(causal_lm(model)).__name__} has several sets of rotary frequencies; use full-recompute"
        )
    return found[0].detach().float()


class Rotation:
    """A move by some positions, ready for the keys of every layer.

    Args:
        delta: positions to move, one number or `(batch, tokens)`.
        inv_freq: `(rotary_dim / 2,)`, rotary_dim <= head_dim; the dimensions behind stay as they are.
        pairing: "halves" or "neighbors".
    """

    def __init__(self, delta: Tensor | int, inv_freq: Tensor, pairing: str = _HALVES) -> None:
        where = inv_freq.device if inv_freq.device.type == "cuda" else "cpu"  # not every accelerator has float64
        steps = torch.as_tensor(delta, device=where, dtype=torch.float64)
        angle = steps[..., None] * inv_freq.to(where, torch.float64)  # (frequencies,) or (batch, tokens, frequencies)
        if angle.ndim == 3:
            angle = angle[:, None]
        self.cos, self.sin = (part.to(inv_freq.device, torch.float32) for part in (angle.cos(), angle.sin()))
        self.width, self.pairing = 2 * inv_freq.shape[0], pairing

    def inverse(self) -> Rotation:
        """The same move backwards."""
        other = object.__new__(Rotation)
        other.cos, other.sin, other.width, other.pairing = self.cos, -self.sin, self.width, self.pairing
        return other

    def __call__(self, keys: Tensor) -> Tensor:
        """Keys `(batch, kv_heads, tokens, head_dim)` moved, computed in float32 and returned in their own type."""
        cos, sin = self.cos.to(keys.device), self.sin.to(keys.device)
        turning = keys[..., : self.width].float()
        if self.pairing == _HALVES:
            first, second = turning.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            first, second = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(keys.dtype), keys[..., self.width :]], dim=-1)


def rotate(keys: Tensor, delta: Tensor | int, inv_freq: Tensor, pairing: str = _HALVES) -> Tensor:
    """Keys `(batch, kv_heads, tokens, head_dim)` moved by `delta` positions; arguments as of `Rotation`."""
    return Rotation(delta, inv_freq, pairing)(keys)


@torch.no_grad()
def rotary_layout(model: nn.Module) -> RotaryLayout:
    """Find out how the model rotates its keys; asked once per model (one forward of one token at two positions).

    Raises:
        UnsupportedCacheError: the keys do not follow the model's rotary frequencies (a norm behind the rotation, say).
    """
    base = causal_lm(model)
    known = base.get_input_embeddings().weight
    if known not in _layouts:
        _layouts[known] = _probe(base)
    layout: RotaryLayout = _layouts[known]
    return layout


def _probe(model: Any) -> RotaryLayout:
    inv_freq, device = frequencies(model), model_device(model)
    cache = DynamicCache()
    ids = torch.full((2, 1), model.get_input_embeddings().num_embeddings // 2, device=device)
    positions = torch.tensor([[0], [_PROBE_POSITION]], device=device)
    with without_cudnn():
        evaluating(decoder(model))(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    choices: list[str | None] = []
    for layer in cache.layers:
        here, there = layer.keys[:1], layer.keys[1:]
        if _close(here, there):
            choices.append(None)
            continue
        fits = [p for p in (_HALVES, _NEIGHBORS) if _close(rotate(here, _PROBE_POSITION, inv_freq, p), there)]
        if not fits:
            raise UnsupportedCacheError(
                f"{type(model).__name__} does not rotate its keys by its rotary frequencies alone, so cached tokens "
                "cannot be moved; use full-recompute or kveraser"
            )
        choices.append(fits[0])
    pairing = next((choice for choice in choices if choice), _HALVES)
    return RotaryLayout(pairing, tuple(choice is not None for choice in choices))


def _close(left: Tensor, right: Tensor) -> bool:
    tolerance = 3e-2 if left.dtype in (torch.bfloat16, torch.float16) else 1e-3
    return bool((left.float() - right.float()).norm() <= tolerance * right.float().norm() + 1e-9)
