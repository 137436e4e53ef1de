"""Who has read spans of a stored context, and states that hide a span; told from the store's files, in the scheduler's process.

Knows: the store, probes, how an eraser's readers are chosen. Does not know about requests, or how runs are recomputed.

The files hold all layers and heads, however the model is split over processes; so nothing is gathered from workers, and the
same is chosen with any number of them. It runs in a thread beside the scheduler: other requests go on meanwhile. What a
worker knows of the model (how it rotates keys) it writes into the store when it starts.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch

from kveraser.cache import Tokens
from kveraser.engines.vllm.protocol import Found, Learn, Look
from kveraser.engines.vllm.server.store import EditStore
from kveraser.engines.vllm.server.stored import HeardSource, StoredBackend, StoredSource
from kveraser.engines.vllm.server.turning import read_turning
from kveraser.eraser.config import EraserConfig
from kveraser.errors import EngineError
from kveraser.methods.base import Edit
from kveraser.methods.choosing import Wish, choose_readers
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers import (
    FILE_NAME,
    Calibration,
    cached_file,
    calibrate,
    known_calibration,
    read_calibration,
    remember,
    write_calibration,
)
from kveraser.readers.known import KEPT_FROM


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
        found = read_calibration(file) if file.is_file() else known_calibration(self._source())
        return found if found is not None and found.fingerprint.difference_to(self.fingerprint) is None else None

    @torch.no_grad()
    def learn(self, learn: Learn) -> dict[str, Any]:
        """Calibrate, and keep that in the cache folder; returns what a session has to know of choosing readers now.

        Raises:
            CalibrationError: too few tokens.
            StoreError: states are missing or damaged.
        """
        source = HeardSource(self, self.store, self.fingerprint, learn, self.heads)
        made = calibrate(source, [0] * learn.tokens)  # which ones they were does not matter to whoever has their states
        if learn.tokens >= KEPT_FROM:
            write_calibration(cached_file(source), made, private=True)
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
        backend = StoredBackend(self._source(look), look)
        ids = torch.zeros(1, look.length, dtype=torch.long)  # what they are does not matter to whoever looks at states
        edit = Edit(backend, Tokens(ids), look.spans, backend.marks, _no_eraser)
        choice = choose_readers(edit, Wish(look.repair, look.coverage, look.block, None), calibration)
        runs = choice.runs if choice else ()
        before = (runs[0].start if runs else look.spans[0].end) - 1
        hidden = tuple(self._hide(longest, place, client) for place in (before, look.length - 1))
        residual = choice.residual if choice else None
        return Found(runs, residual, choice.notes if choice else (), hidden)  # type: ignore[arg-type]

    def _source(self, look: Look | None = None) -> StoredSource:
        return StoredSource(self, self.store, self.fingerprint, look, self.calibration if look else None)

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


def about_readers(looking: Looking | None) -> dict[str, Any]:
    """What a session has to know of choosing readers; nothing where they cannot be told."""
    if looking is None:
        return {}
    if not looking.knows:
        return {"learns": True} if looking.heads else {}
    known = looking.config
    return {"choose": known.choose, "readers": known.repair, "preferred": known.preferred, "learns": False}


def _no_eraser() -> NoReturn:
    raise EngineError("an eraser is not asked for its states here")
