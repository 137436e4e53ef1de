"""A worker's side of the connector: moves states between the store and the blocks of its cache.

Knows: the store, the layout of a worker's cache. Does not know what requests asked for (`scheduler.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger

from kveraser.engines.vllm.protocol import Save
from kveraser.engines.vllm.server.layout import WorkerCache
from kveraser.engines.vllm.server.step import Load, Step
from kveraser.engines.vllm.server.store import EditStore
from kveraser.engines.vllm.server.turning import write_turning
from kveraser.errors import EngineError, KVEraserError, UnsupportedCacheError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.kveraser")

_MOST_HEARD = 4
"""Requests whose queries are kept at a time."""


class WorkerSide:
    """What the connector does in a process that holds a part of the model.

    Args:
        store: of this engine.
        config: vLLM's.
        block_size: positions per block.
    """

    def __init__(self, store: EditStore, config: VllmConfig, block_size: int) -> None:
        self._store, self._config, self._block_size = store, config, block_size
        self._cache: WorkerCache | None = None
        self._failed_blocks: set[int] = set()
        self._heard: list[list[Tensor]] | None = None
        self._slots: Tensor | None = None
        self._queries: dict[str, Tensor] = {}

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Find out how the engine has laid out its cache."""
        layers = self._config.compilation_config.static_forward_context
        geometry = self._store.geometry
        rotary = getattr(self._config.model_config.hf_text_config, "no_rope_layers", None) or [True] * geometry.layers
        self._cache = WorkerCache(
            {name: layers[name] for name in kv_caches},
            self._block_size,
            geometry.kv_heads,
            [bool(entry) for entry in rotary],
        )
        if self._cache.layers.start == self._cache.heads.start == 0 and self._cache.writes:
            with suppress(UnsupportedCacheError):  # then readers cannot be told, and whoever asks is told so
                write_turning(self._store, self._cache.turning)

    def listen(self) -> None:
        """Keep the queries of the step that comes."""
        assert self._cache is not None
        self._heard = self._cache.listen()

    def load(self, step: Step, slots: Mapping[str, Tensor]) -> None:
        """Put states into blocks; where that fails, note the blocks, and the request fails.

        Args:
            slots: by layer, where the step will put the states of its tokens.
        """
        self._slots = next(iter(slots.values()), None)
        for job in step.loads:
            try:
                if job.refused is not None:
                    raise EngineError(job.refused)
                self._fill(job)
            except Exception as error:  # whatever went wrong, this one request fails and the engine goes on
                if not isinstance(error, KVEraserError):
                    logger.exception("kveraser: loading for request %s failed", job.request)
                else:
                    logger.error("kveraser: request %s fails: %s", job.request, error)
                first, last = job.start // self._block_size, -(-job.end // self._block_size)
                self._failed_blocks.update(job.blocks[first:last])

    def _fill(self, job: Load) -> None:
        assert self._cache is not None
        parts = []
        at = 0
        for piece in job.pieces:
            low, high = max(job.start - at, 0), min(job.end - at, len(piece))
            if low < high:
                entry = self._store.entry(piece.entry)
                chosen = piece.cut(low, high)
                keys, values = self._store.read(entry, chosen.start, chosen.end, self._cache.layers, self._cache.heads)
                parts.append((self._cache.moved(keys, piece.move), values))
            at += len(piece)
        keys = torch.cat([part[0] for part in parts], 1)
        values = torch.cat([part[1] for part in parts], 1)
        if keys.shape[1] != job.end - job.start:
            raise EngineError(f"{keys.shape[1]} states were found for positions [{job.start}, {job.end})")
        self._cache.write(job.blocks, job.start, keys, values)

    def keep(self, step: Step) -> None:
        """Write states and queries into entries."""
        self._hear(step)
        for job in step.keeps:
            for entry, save in job.saves:
                try:
                    self._keep(entry, save, job.blocks)
                except Exception:  # the entry stays incomplete, so the scheduler will not seal it
                    logger.exception("kveraser: states could not be kept")

    def _keep(self, entry: str, save: Save, blocks: tuple[int, ...]) -> None:
        assert self._cache is not None
        if self._cache.writes:
            keys, values = self._cache.read(blocks, save.start, save.end)
            moved = self._cache.moved(keys, save.move)
            self._store.write(entry, self._cache.layers.start, self._cache.heads.start, moved, values)

    def _hear(self, step: Step) -> None:
        """Sort the queries of a step by request; write those that are complete."""
        if self._heard is None:
            return
        assert self._cache is not None
        cache, heard, self._heard = self._cache, self._heard, None
        cache.stop_listening()
        try:
            if self._slots is None or not all(heard):
                raise EngineError("the attention layers of this engine cannot be listened to")
            step_queries = torch.stack([torch.cat(layer).view(-1, *layer[0].shape[-2:]) for layer in heard])
            for job in step.observes:
                rows, positions = cache.positions_of(self._slots, job.blocks, job.tokens)
                shape = (len(heard), job.tokens, *step_queries.shape[2:])
                kept = self._queries.setdefault(job.request, torch.full(shape, torch.nan, dtype=step_queries.dtype))
                kept[:, positions] = step_queries[:, rows.to(step_queries.device)].cpu()
                if not kept[0, :, 0, 0].isnan().any():
                    self._write_queries(job.entries, self._queries.pop(job.request))
            while len(self._queries) > _MOST_HEARD:  # requests that were given up
                self._queries.pop(next(iter(self._queries)))
        except Exception:  # the entries stay incomplete, so the scheduler will not seal them
            logger.exception("kveraser: queries could not be kept")

    def _write_queries(self, entries: tuple[str, ...], queries: Tensor) -> None:
        """Two of the queries of a key head go into the places of its key and its value."""
        assert self._cache is not None
        if not self._cache.writes:
            return
        layers, tokens, _, size = queries.shape
        grouped = queries.view(layers, tokens, len(self._cache.heads), -1, size)
        for number, entry in enumerate(entries):
            one, other = (grouped[..., min(2 * number + place, grouped.shape[3] - 1), :] for place in (0, 1))
            self._store.write(entry, self._cache.layers.start, self._cache.heads.start, one, other)

    def take_failed(self) -> set[int]:
        """Blocks that could not be filled since this was asked last."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed
