"""A context in the store, as the code that tells readers sees one: a source of states, and a backend that can do no more than that.

Knows: the store, sources, backends. Does not know which readers are chosen, or who asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kveraser.cache import Backend, Can, Kept, Marks, Steered, Tokens
from kveraser.engines.vllm.protocol import Learn, Look
from kveraser.engines.vllm.server.store import EditStore
from kveraser.engines.vllm.server.turning import read_turning
from kveraser.errors import CalibrationError
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers import Calibration, Source, Turning
from kveraser.readers.observing import Layer, Observed
from kveraser.spans import Span


class StoredSource(Source):
    """The model of an engine, with states from its store or (to find what is known of it) without.

    Args:
        owner: stands for the model.
        look: at what; None without states.
        calibration: says which layers are looked at.
    """

    def __init__(self, owner: Any, store: EditStore, fingerprint: Fingerprint, look: Look | None = None,
                 calibration: Calibration | None = None) -> None:  # fmt: skip
        self.owner, self.store, self._fingerprint = owner, store, fingerprint
        self._look, self._calibration = look, calibration
        self.dtype = getattr(torch, store.geometry.dtype)

    @property
    def fingerprint(self) -> Fingerprint:
        return self._fingerprint

    @cached_property
    def turning(self) -> Turning:  # type: ignore[override]
        return read_turning(self.store)

    @cached_property
    def layers(self) -> dict[int, _Layer]:  # type: ignore[override]
        """The layers that probes look at, `(1, kv_heads, slots, head_dim)` each."""
        calibration, look, store = self._calibration, self._look, self.store
        assert calibration is not None and look is not None and calibration.scan is not None
        wanted = {layer for probe in (calibration.scan, *calibration.probes) for layer in (probe.layer, *probe.sources)}
        layers = range(min(wanted), max(wanted) + 1)
        heads = range(store.geometry.kv_heads)
        parts = [store.read(store.entry(piece.entry), piece.start, piece.end, layers, heads) for piece in look.pieces]
        keys, values = (
            torch.cat(states, 1).transpose(1, 2)[:, None].contiguous() for states in zip(*parts, strict=True)
        )
        return {layer: _Layer(keys[layer - layers.start], values[layer - layers.start]) for layer in wanted}

    def observe(self, ids: Tensor, gone: Tensor | None = None) -> Observed:
        raise CalibrationError("a stored context cannot be listened to")


@dataclass(frozen=True)
class _Layer:
    keys: Tensor
    values: Tensor


class HeardSource(StoredSource):
    """The model of an engine, as two requests have shown it: a text, and the text without some tokens."""

    def __init__(self, owner: Any, store: EditStore, fingerprint: Fingerprint, learn: Learn, heads: int) -> None:
        super().__init__(owner, store, fingerprint)
        self._learn, self._heads = learn, heads

    def observe(self, ids: Tensor, gone: Tensor | None = None) -> Observed:
        geometry, store, count = self.store.geometry, self.store, ids.shape[1]
        every = range(geometry.layers), range(geometry.kv_heads)

        def read(entry: str) -> tuple[Tensor, ...]:
            """Keys and values `(layers, kv_heads, tokens, head_dim)`."""
            found = store.entry(entry)
            return tuple(part.transpose(1, 2) for part in store.read(found, 0, found.tokens, *every))

        stays = torch.arange(count) if gone is None else (~gone).nonzero()[:, 0]
        keys, values = read(self._learn.whole[0] if gone is None else self._learn.rest)
        if keys.shape[2] != len(stays):
            raise CalibrationError(f"states of {len(stays)} tokens are needed, {keys.shape[2]} were kept")
        turns, seen = self.turning.at(stays - torch.arange(len(stays))), Observed(DynamicCache())
        for layer in every[0]:
            states = torch.zeros(2, geometry.kv_heads, count, geometry.head_dim)
            states[0][:, stays] = turns.to_place(keys[layer].float(), layer)
            states[1][:, stays] = values[layer].float()
            seen.cache.update(states[:1], states[1:], layer)
        if gone is None:
            pairs = [read(entry) for entry in self._learn.whole[1:]]
            queries = torch.stack(
                [part for pair in pairs for part in pair], 2
            )  # (layers, kv_heads, of each, tokens, head_dim)
            queries = queries[:, :, : self._heads // geometry.kv_heads].flatten(1, 2).float()
            for layer in every[0]:
                seen.layers[layer] = Layer(queries[layer], geometry.head_dim**-0.5)
        return seen


class StoredBackend(Backend):
    """A stored context, of which it can only be told who has read something."""

    name = "vLLM"
    can = frozenset({Can.TELL, Can.RUNS})

    def __init__(self, source: StoredSource, look: Look) -> None:
        self._source, self._look = source, look
        self.marks = Marks(steered=tuple(Steered(span, torch.empty(0)) for span in look.absent))

    @property
    def length(self) -> int:
        return self._look.length

    @property
    def bytes_per_slot(self) -> int:
        return self._source.store.geometry.bytes_per_token

    def source(self) -> StoredSource:
        return self._source

    def take(self, span: Span) -> Kept:
        self._cannot(Can.READ)

    def put(self, span: Span, states: Kept) -> None:
        self._cannot(Can.READ)

    def crop(self, length: int) -> None:
        self._cannot(Can.READ)

    def extend(self, tokens: Tokens, chunk: int | None = None) -> None:
        self._cannot(Can.READ)
