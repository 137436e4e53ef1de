"""Who has read spans of a stored context, and states that hide a span; told from the store's files, in the scheduler's process.

Knows: the store, probes, how an eraser's readers are chosen. Does not know about requests, or how runs are recomputed.

The files hold all layers and heads, however the model is split over processes; so nothing is gathered from workers, and the
same is chosen with any number of them. It runs in a thread beside the scheduler: other requests go on meanwhile. What a
worker knows of the model (how it rotates keys) it writes into the store when it starts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kveraser.cache import Backend, Can, Kept, Marks, Steered, Tokens
from kveraser.engines.vllm.protocol import Found, Learn, Look
from kveraser.engines.vllm.server.entries import Geometry
from kveraser.engines.vllm.server.store import EditStore
from kveraser.eraser.config import EraserConfig
from kveraser.errors import CalibrationError, EngineError
from kveraser.files import write_atomically
from kveraser.methods.base import Edit
from kveraser.methods.choosing import Wish, choose_readers
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers import (
    FILE_NAME,
    Calibration,
    Source,
    Turning,
    cached_file,
    calibrate,
    known_calibration,
    read_calibration,
    remember,
    write_calibration,
)
from kveraser.readers.known import KEPT_FROM
from kveraser.readers.observing import Layer, Observed
from kveraser.spans import Span


def write_turning(store: EditStore, turning: Turning) -> None:
    """Note how the model of this engine rotates keys, for whoever looks at its states."""
    about = {"rotary": turning.rotary, "pairing": turning.pairing, "inv_freq": turning.inv_freq.tolist()}
    write_atomically(_turning_file(store), json.dumps(about).encode())


def read_turning(store: EditStore) -> Turning:
    """What a worker has noted.

    Raises:
        CalibrationError: nothing, since the model has no rotary embedding, or several.
    """
    try:
        about = json.loads(_turning_file(store).read_text(encoding="utf-8"))
        frequencies = torch.tensor(about["inv_freq"], dtype=torch.float64)
        return Turning(tuple(about["rotary"]), about["pairing"], frequencies)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"how this model rotates its keys is not known, readers cannot be told: {error}"
        ) from error


class Looking:
    """Looks at states in a store.

    Args:
        store: of the engine.
        eraser: the folder of its eraser. Probes are in there, or in the cache folder.
        config: of the eraser; the model is known by its fingerprint.
        heads: query heads of the model; 0 where the workers cannot show them.
    """

    def __init__(self, store: EditStore, eraser: Path, config: EraserConfig, heads: int) -> None:
        self.store, self.config, self.heads = store, config, heads
        self._folder = eraser

    @property
    def fingerprint(self) -> Fingerprint:
        """Of the engine's model."""
        return self.config.fingerprint

    @property
    def of_queries(self) -> int:
        """Entries that the queries of a text take: two for every key head in each."""
        return -(-self.heads // self.store.geometry.kv_heads // 2)

    @property
    def knows(self) -> bool:
        """Whether readers can be told, and spans be hidden."""
        return self.calibration is not None

    @cached_property
    def calibration(self) -> Calibration | None:
        """The probes of the model; None when there are none, or none that serve here."""
        file = self._folder / FILE_NAME
        found = read_calibration(file) if file.is_file() else known_calibration(StoredSource(self, None))
        return found if found is not None and found.fingerprint.difference_to(self.fingerprint) is None else None

    @torch.no_grad()
    def learn(self, learn: Learn) -> dict[str, Any]:
        """Calibrate, and keep that in the cache folder; returns what a session has to know of choosing readers now.

        Raises:
            CalibrationError: too few tokens.
            StoreError: states are missing or damaged.
        """
        source = HeardSource(self, learn)
        made = calibrate(source, [0] * learn.tokens)  # which ones they were does not matter to whoever has their states
        if learn.tokens >= KEPT_FROM:
            write_calibration(cached_file(source), made)
        remember(source, made)
        self.calibration = made
        return about_readers(self)

    def look(self, look: Look, client: str | None = None) -> Found:
        """Choose the readers to recompute, and make the states that hide a span.

        Raises:
            EngineError: nothing is known that tells readers of this model.
            StoreError: states are missing or damaged, or there is no room.
        """
        calibration = self.calibration
        if calibration is None:
            raise EngineError("nothing is known that tells readers of this model; choose the next tokens")
        pieces = [piece.entry for piece in look.pieces]
        longest = max(map(len, (*look.spans, *look.absent)))
        self.store.make_room(2 * longest * self.store.geometry.bytes_per_token, keep=pieces, client=client)
        backend = StoredBackend(self, look)
        ids = torch.zeros(1, look.length, dtype=torch.long)  # what they are does not matter to whoever looks at states
        edit = Edit(backend, Tokens(ids), look.spans, backend.marks, _no_eraser)
        choice = choose_readers(edit, Wish(look.repair, look.coverage, look.block, None), calibration)
        runs = choice.runs if choice else ()
        before = (runs[0].start if runs else look.spans[0].end) - 1
        hidden = tuple(self._hide(longest, place, client) for place in (before, look.length - 1))
        residual = choice.residual if choice else None
        return Found(runs, residual, choice.notes if choice else (), hidden)  # type: ignore[arg-type]

    def _hide(self, tokens: int, position: int, client: str | None) -> str:
        """An entry of states that nothing attends to from a position on: keys that no query likes, and values of zero."""
        assert self.calibration is not None
        geometry = self.store.geometry
        neutral, turns = self.calibration.neutral, read_turning(self.store).at(torch.tensor([position]))
        keys = torch.stack([turns.to_place(key[:, None], layer)[:, 0] for layer, key in enumerate(neutral)])
        spread = keys[:, None].expand(geometry.layers, tokens, geometry.kv_heads, geometry.head_dim)
        states = spread.to(getattr(torch, geometry.dtype)).contiguous()
        entry = self.store.new_id()
        self.store.write(entry, 0, 0, states, torch.zeros_like(states))
        return self.store.seal(entry, tokens, client).id


class StoredSource(Source):
    """The model of an engine, with states from its store or (to find what is known of it) without.

    Args:
        looking: who looks, and where.
        look: at what.
    """

    def __init__(self, looking: Looking, look: Look | None) -> None:
        self.owner = self._looking = looking
        self._look = look
        self.dtype = getattr(torch, looking.store.geometry.dtype)

    @property
    def fingerprint(self) -> Fingerprint:
        return self._looking.fingerprint

    @cached_property
    def turning(self) -> Turning:  # type: ignore[override]
        return read_turning(self._looking.store)

    @cached_property
    def layers(self) -> dict[int, _Layer]:  # type: ignore[override]
        """The layers that probes look at, `(1, kv_heads, slots, head_dim)` each."""
        calibration, look, store = self._looking.calibration, self._look, self._looking.store
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

    def __init__(self, looking: Looking, learn: Learn) -> None:
        super().__init__(looking, None)
        self._learn = learn

    def observe(self, ids: Tensor, gone: Tensor | None = None) -> Observed:
        geometry, store, count = self._looking.store.geometry, self._looking.store, ids.shape[1]
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
            queries = queries[:, :, : self._looking.heads // geometry.kv_heads].flatten(1, 2).float()
            for layer in every[0]:
                seen.layers[layer] = Layer(queries[layer], geometry.head_dim**-0.5)
        return seen


class StoredBackend(Backend):
    """A stored context, of which it can only be told who has read something."""

    name = "vLLM"
    can = frozenset({Can.TELL, Can.RUNS})

    def __init__(self, looking: Looking, look: Look) -> None:
        self._source, self._look = StoredSource(looking, look), look
        self._geometry: Geometry = looking.store.geometry
        self.marks = Marks(steered=tuple(Steered(span, torch.empty(0)) for span in look.absent))

    @property
    def length(self) -> int:
        return self._look.length

    @property
    def bytes_per_slot(self) -> int:
        return self._geometry.bytes_per_token

    def source(self) -> StoredSource:
        return self._source

    def take(self, span: Span) -> Kept:
        self._cannot(Can.READ)

    def put(self, span: Span, states: Kept) -> None:
        self._cannot(Can.READ)

    def crop(self, length: int) -> None:
        self._cannot(Can.READ)

    def extend(self, tokens: Tokens, chunk: int = 0) -> None:
        self._cannot(Can.READ)


def about_readers(looking: Looking | None) -> dict[str, Any]:
    """What a session has to know of choosing readers; nothing where they cannot be told."""
    if looking is None:
        return {}
    if not looking.knows:
        return {"learns": True} if looking.heads else {}
    known = looking.config
    return {"choose": known.choose, "readers": known.repair, "preferred": known.preferred, "learns": False}


def _turning_file(store: EditStore) -> Path:
    return store.folder / f"turning-{hashlib.sha256(store.geometry.model.encode()).hexdigest()[:16]}.json"


def _no_eraser() -> NoReturn:
    raise EngineError("an eraser is not asked for its states here")
