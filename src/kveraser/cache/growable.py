"""A cache layer that grows without copying itself for every decoded token.

Knows: transformers' `DynamicLayer` interface. Does not know about models, spans or erasing.

`DynamicLayer` concatenates: every decoded token copies the whole layer. `GrowableLayer` keeps a buffer with room to
spare (amortised O(1) copies per token) and hands out views of its filled part, so that an edit in place costs what it
writes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from kveraser.errors import CacheMismatchError, UnsupportedCacheError

_GROWTH = 1.5
_FIRST_CAPACITY = 64


def _writable(buffer: Tensor) -> torch.inference_mode:
    """A context in which `buffer` may be written: inference tensors can only be changed in inference mode."""
    return torch.inference_mode(buffer.is_inference() or torch.is_inference_mode_enabled())


class GrowableLayer(DynamicLayer):
    """Keys and values `(batch, kv_heads, tokens, head_dim)` in buffers `(batch, kv_heads, capacity, head_dim)`.

    `keys` and `values` are views of the filled part; assigning to them adopts the assigned tensor as the buffer.
    For inference: states that require a gradient are refused.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._buffers: list[Tensor | None] = [None, None]
        self._length = 0
        super().__init__(**kwargs)

    # The base class reads and assigns `keys` and `values`; here they are windows onto the buffers.
    def _view(self, index: int) -> Tensor | None:
        buffer = self._buffers[index]
        return None if buffer is None else buffer[:, :, : self._length]

    def _adopt(self, index: int, states: Tensor | None) -> None:
        if states is not None and states.ndim != 4:  # the base class starts from a 1-D empty tensor
            states = None
        self._buffers[index] = states
        self._length = 0 if states is None else states.shape[-2]

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The keys so far, `(batch, kv_heads, tokens, head_dim)`; a view."""
        return self._view(0)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._adopt(0, states)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The values so far, `(batch, kv_heads, tokens, head_dim)`; a view."""
        return self._view(1)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._adopt(1, states)

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return 0 if self._buffers[0] is None else self._buffers[0].shape[-2]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take type and device from the first states; nothing is allocated yet."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def reserve(self, tokens: int, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for `tokens` in all; batch, heads and head size are those of the given states.

        Raises:
            CacheMismatchError: these are others than those of the states that are there.
        """
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            if buffer is not None and (*buffer.shape[:2], buffer.shape[-1]) != (*states.shape[:2], states.shape[-1]):
                raise CacheMismatchError(
                    f"states of {states.shape[0]} row(s) with {states.shape[1]} heads of size {states.shape[-1]} do not fit a cache that "
                    f"has {buffer.shape[0]} with {buffer.shape[1]} of size {buffer.shape[-1]}; repeat or select its rows first"
                )
        if self.capacity >= tokens:
            return
        capacity = max(tokens, int(self.capacity * _GROWTH), _FIRST_CAPACITY)
        grown: list[Tensor | None] = []
        for index, like in enumerate((key_states, value_states)):
            buffer = like.new_empty((*like.shape[:2], capacity, like.shape[-1]))
            if self._length:
                buffer[:, :, : self._length] = self._view(index)  # type: ignore[assignment]
            grown.append(buffer)
        self._buffers = grown  # only now, so that running out of memory loses nothing

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append `(batch, kv_heads, new, head_dim)` states; returns views of all keys and values.

        Raises:
            UnsupportedCacheError: when the states require a gradient.
            CacheMismatchError: as `reserve`.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise UnsupportedCacheError(
                "a growable cache layer writes in place and carries no gradients; "
                "run under torch.no_grad(), or train with transformers' DynamicCache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self._length, self._length + key_states.shape[-2]
        self.reserve(end, key_states, value_states)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            assert buffer is not None
            with _writable(buffer):
                buffer[:, :, start:end] = states
        self._length = end
        return self.keys, self.values  # type: ignore[return-value]

    def get_seq_length(self) -> int:
        """Number of tokens in the layer."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. The buffer keeps its room.

        A positive count goes to the installed transformers version, which deprecated it and then refused it.
        """
        if tokens_to_remove > 0:
            super().crop(tokens_to_remove)
        else:
            self._length = max(self._length + tokens_to_remove, 0)

    def reset(self) -> None:
        """Forget everything, the buffers included."""
        self._buffers, self._length, self.is_initialized = [None, None], 0, False

    def take_over(self, other: GrowableLayer) -> None:
        """Exchange contents with another layer; no tensor is copied."""
        for name in ("_buffers", "_length", "is_initialized"):
            mine, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, theirs)
            setattr(other, name, mine)

    def wipe_spare(self) -> None:
        """Overwrite the unused part of the buffers: it may hold states of tokens that were cropped."""
        for buffer in self._buffers:
            if buffer is not None:
                with _writable(buffer):
                    buffer[:, :, self._length :] = 0

    def _each_buffer(self, change: Any) -> None:
        self._buffers = [None if buffer is None else change(buffer) for buffer in self._buffers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick rows for beam search; the buffer keeps its room."""
        self._each_buffer(lambda buffer: buffer.index_select(0, beam_idx.to(buffer.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times; the buffer keeps its room."""
        self._each_buffer(lambda buffer: buffer.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`; the buffer keeps its room."""
        self._each_buffer(lambda buffer: buffer[indices, ...])

    def __deepcopy__(self, memo: dict[int, Any]) -> GrowableLayer:
        copy = type(self)()
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__)
        copy._buffers = [None if self._view(i) is None else self._view(i).clone() for i in (0, 1)]  # type: ignore[union-attr]
        return copy


def growable_cache() -> DynamicCache:
    """An empty `DynamicCache` whose layers are growable."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowableLayer
    return cache
