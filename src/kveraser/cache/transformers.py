"""A transformers cache as a backend: it can do everything that methods ask for.

Knows: the functions of this package. Does not know about methods, ledgers or erasers, but for how one is attached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kveraser.cache.backend import Backend, Can, Kept
from kveraser.cache.closing import closing_gaps
from kveraser.cache.deleting import check_movable, delete_slots, open_slots
from kveraser.cache.marks import Marks, Steered, get_marks, set_marks
from kveraser.cache.passes import Rewrite, extend, look, prefill_chunk, range_bytes, recompute, rewrite_runs
from kveraser.cache.repair import Repair, can_close_gaps, repair_slots
from kveraser.cache.support import writing
from kveraser.cache.surgery import States, append, cache_length, cut, snapshot, snapshots, truncate, write, write_all
from kveraser.cache.tokens import Tokens
from kveraser.errors import CacheMismatchError
from kveraser.model.kernels import without_cudnn
from kveraser.model.view import finish, model_device, model_dtype
from kveraser.spans import Span

_SOME = 64
"""Tokens whose values are looked at to tell how a cache was rounded."""


class KeptTensors(Kept):
    """Keys and values `(batch, kv_heads, tokens, head_dim)` of some slots, per layer."""

    def __init__(self, states: States) -> None:
        self.states = states

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors())

    def clear(self) -> None:
        storages = [tensor.untyped_storage() for tensor in self._tensors()]
        for storage in {
            each.data_ptr(): each for each in storages
        }.values():  # spans that were kept together share them
            storage.fill_(0)  # type: ignore[attr-defined]

    def part(self, run: slice) -> KeptTensors:
        return KeptTensors([(keys[:, :, run], values[:, :, run]) for keys, values in self.states])

    def copy(self) -> KeptTensors:
        return KeptTensors([(keys.clone(), values.clone()) for keys, values in self.states])

    def overwrite(self, other: Kept) -> None:
        for old, new in zip(self._tensors(), cast("KeptTensors", other)._tensors(), strict=True):
            with torch.inference_mode(old.is_inference()):
                old[:] = new

    def _tensors(self) -> list[Tensor]:
        return [tensor for pair in self.states for tensor in pair]


class TransformersBackend(Backend):
    """A model and a cache that it filled, edited in place.

    Args:
        model: None where nothing is to be run.
    """

    name = "transformers"
    can = frozenset(Can)

    def __init__(self, model: nn.Module | None, cache: Cache) -> None:
        self.model = model
        self.cache = cache

    @property
    def closes_gaps(self) -> bool:
        return can_close_gaps(self.model)

    @property
    def length(self) -> int:
        return cache_length(self.cache)

    @property
    def bytes_per_slot(self) -> int:
        return range_bytes(self.cache, 1)

    @property
    def marks(self) -> Marks:
        return get_marks(self.cache)

    @marks.setter
    def marks(self, marks: Marks) -> None:
        set_marks(self.cache, marks)

    def steered(self, span: Span) -> Steered:
        return Steered.mark(self.cache, span)

    def take(self, span: Span) -> KeptTensors:
        return KeptTensors(snapshot(self.cache, span))

    def put(self, span: Span, states: Kept) -> None:
        tensors = cast("KeptTensors", states).states
        if span.start >= self.length:
            append(self.cache, tensors)
        else:
            write(self.cache, span.start, tensors)

    def take_all(self, spans: Sequence[Span]) -> list[Kept]:
        return [KeptTensors(states) for states in snapshots(self.cache, spans)]

    def put_all(self, regions: Sequence[tuple[Span, Kept]]) -> None:
        length = self.length
        write_all(
            self.cache, [(span, cast("KeptTensors", kept).states) for span, kept in regions if span.start < length]
        )
        for span, kept in regions:
            if span.start >= length:
                append(self.cache, cast("KeptTensors", kept).states)

    def finish(self) -> None:
        if self.length:
            finish(self.cache.layers[0].keys.device)

    def check_rounding(self) -> None:
        if not self.length:
            return
        layer = self.cache.layers[0]
        if torch.is_autocast_enabled(layer.keys.device.type):
            raise CacheMismatchError(
                "torch.autocast is on, under which states are rounded in another way; call this outside of it, or load the "
                "model with the dtype that you want"
            )
        some = layer.values[:, :, : self.length : max(self.length // _SOME, 1)]
        if some.dtype is torch.float32 and model_dtype(self.model) is torch.float32 and bool(some.any()):
            for rounded in (torch.bfloat16, torch.float16):
                if torch.equal(some.to(rounded).float(), some):
                    raise CacheMismatchError(
                        f"the cache was filled under torch.autocast: its float32 values are rounded to {rounded}. Fill it "
                        "outside of autocast, or load the model with that dtype"
                    )

    def crop(self, length: int) -> None:
        truncate(self.cache, length)

    def writing(self) -> AbstractContextManager[Any]:
        return writing(self.cache)

    @contextmanager
    def reading(self, otherwise: nn.Module | None = None) -> Iterator[Any]:
        """The model that new tokens are to be run with: across the gaps of steered spans as if there were none.

        Args:
            otherwise: given where there is no gap; None for the backend's model.
        """
        with without_cudnn(), closing_gaps(self.model, self.marks.steered, otherwise or self.model) as model:
            yield model

    @property
    def chunk(self) -> int:
        return prefill_chunk(model_device(self.model))

    def extend(self, tokens: Tokens, chunk: int | None = None) -> None:
        with self.reading() as model:
            extend(model, self.cache, tokens, chunk or self.chunk)

    def rebuild(self, tokens: Tokens, removed: tuple[Span, ...], start: int, chunk: int) -> int:
        cut(self.cache, removed)
        if start >= tokens.length:
            return 0
        return recompute(self.model, self.cache, tokens, Span(start, tokens.length), chunk)

    def check_movable(self) -> None:
        check_movable(self.model)

    def delete(self, tokens: Tokens, spans: tuple[Span, ...]) -> tuple[Tokens, int]:
        return delete_slots(self.model, self.cache, tokens, spans, self.marks.cut(spans).steered_spans)

    def open(self, tokens: Tokens, blank: tuple[Span, ...], steered: tuple[Span, ...]) -> int:
        return open_slots(self.model, self.cache, tokens, blank, steered)

    def recompute(self, tokens: Tokens, span: Span) -> int:
        return recompute(self.model, self.cache, tokens, span, self.chunk)

    def check_eraser(self, eraser: Any) -> None:
        eraser.check_model(self.model)

    def rewrite(
        self, tokens: Tokens, steered: Sequence[Rewrite], repaired: Sequence[Repair], eraser: Any = None
    ) -> int:
        model = self.model
        if steered:
            model = eraser.attached(self.model, first=sum(map(len, steered)) if repaired else None)
        elif eraser is not None and eraser.steers_readers:
            model = eraser.attached(self.model)
        if repaired:
            return repair_slots(model, self.cache, tokens, repaired, steered)
        return rewrite_runs(model, self.cache, tokens, steered)

    def look(self, tokens: Tokens, span: Span, layer: int) -> tuple[Tensor, Tensor]:
        return look(self.model, self.cache, tokens, span, layer)
