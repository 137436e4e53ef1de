"""What the readers' scan looks at: a model's own ways, and the states of one cache of it, whoever runs it.

Knows: what has to be told of a model, and transformers' answers. Does not know about spans or scores, or any other engine.

States are given as transformers has them, `(batch, kv_heads, slots, head_dim)` with rotated keys, so that probes made from one
engine's states serve in another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kveraser.cache import Backend, Can
from kveraser.model.fingerprint import Fingerprint
from kveraser.model.view import causal_lm, model_device, model_dtype
from kveraser.readers.observing import Observed, observe
from kveraser.readers.probes import Turning, norm_of

Norm = Callable[[Tensor], Tensor]


class Source(ABC):
    """A model that can be listened to, with a cache of its states or (for calibrating) without one.

    Attributes:
        owner: the object that stands for the model: what is known of it is remembered by it.
        layers: by their number, something with `keys` and `values` `(batch, kv_heads, slots, head_dim)`; None without a cache.
        writes_neutral: whether slots are hidden there by writing keys that no query likes.
    """

    writes_neutral: ClassVar[bool] = True
    owner: Any
    layers: Any = None
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """Of the model."""

    @property
    @abstractmethod
    def turning(self) -> Turning:
        """How the model rotates keys and queries."""

    def norm(self, layer: int) -> tuple[Norm | None, tuple[int, ...]]:
        """The query norm of a layer, and the shape of what goes into it for one token; None where there is none, as here."""
        return None, ()

    @abstractmethod
    def observe(self, ids: Tensor, gone: Tensor | None = None) -> Observed:
        """Run `(1, tokens)` ids and listen.

        Args:
            gone: `(tokens,)` bool, tokens that no other one sees; what is observed of them does not matter.

        Raises:
            CalibrationError: this model cannot be listened to.
        """


class ModelSource(Source):
    """A transformers model."""

    def __init__(self, model: nn.Module, cache: Cache | None = None) -> None:
        self.model, self.owner = model, causal_lm(model)
        self.layers = None if cache is None else cache.layers
        self.device, self.dtype = model_device(model), model_dtype(model)

    @cached_property
    def fingerprint(self) -> Fingerprint:  # type: ignore[override]
        return Fingerprint.of(self.model)

    @cached_property
    def turning(self) -> Turning:  # type: ignore[override]
        return Turning.of(self.model)

    def norm(self, layer: int) -> tuple[Norm | None, tuple[int, ...]]:
        return norm_of(self.model, layer)

    def observe(self, ids: Tensor, gone: Tensor | None = None) -> Observed:
        return observe(self.model, ids, mask=None if gone is None else _without(gone, self.dtype))


def as_source(model: nn.Module | Source) -> Source:
    """A source as it is; of a transformers model, one without a cache."""
    return model if isinstance(model, Source) else ModelSource(model)


def source_of(backend: Backend) -> Source:
    """What tells who has read something in a backend that can `TELL`."""
    if Can.READ in backend.can:
        return ModelSource(backend.model, backend.cache)
    found: Source = backend.source()
    return found


def _without(gone: Tensor, dtype: torch.dtype) -> Tensor:
    """A causal mask `(1, 1, tokens, tokens)` in which nobody sees the tokens that are gone, but for themselves."""
    count = len(gone)
    seen = torch.ones(count, count, dtype=torch.bool, device=gone.device).tril() & ~gone[None]
    seen |= torch.eye(count, dtype=torch.bool, device=gone.device)
    mask = torch.zeros(count, count, dtype=dtype, device=gone.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
