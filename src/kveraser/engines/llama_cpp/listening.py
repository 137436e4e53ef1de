"""Telling readers from llama.cpp's own states: the cells of a context as a source, and listening to a forward.

Knows: the callback by which llama.cpp shows the tensors of a forward, how it names queries. Does not know about spans or scores.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kveraser.engines.llama_cpp.cells import LIVE, Cells
from kveraser.engines.llama_cpp.library import tensor_data, tensor_name, tensor_operation
from kveraser.engines.llama_cpp.model import LlamaCppModel
from kveraser.engines.llama_cpp.packed import Layers, Packed
from kveraser.errors import CalibrationError
from kveraser.model.fingerprint import Fingerprint
from kveraser.readers import Source, Turning
from kveraser.readers.observing import Layer, Observed
from kveraser.readers.source import Norm
from kveraser.spans import Span

_QUERY, _ROTATED = "Qcur-", "ROPE"


class LlamaCppSource(Source):
    """A model in llama.cpp, with the cells of a context or without.

    Args:
        model: the model.
        cells: their keys and values are copied when they are first asked for.
    """

    writes_neutral = False

    def __init__(self, model: LlamaCppModel, cells: Cells | None = None) -> None:
        self.owner = self.model = model
        self.cells = cells

    @cached_property
    def layers(self) -> Layers:  # type: ignore[override]
        assert self.cells is not None
        return _layers(self.cells)

    @property
    def fingerprint(self) -> Fingerprint:
        return self.model.anatomy.fingerprint

    @property
    def turning(self) -> Turning:
        return self.model.anatomy.turning

    def norm(self, layer: int) -> tuple[Norm | None, tuple[int, ...]]:
        return self.model.anatomy.norm(layer)

    def observe(self, ids: Tensor, gone: Tensor | None = None) -> Observed:
        """As of `Source`; tokens that are gone are not run at all, and the others moved to where they belong."""
        anatomy, count = self.model.anatomy, ids.shape[1]
        stays = torch.arange(count) if gone is None else (~gone).nonzero()[:, 0]
        ear = _Ear(any(anatomy.norm(layer)[0] is not None for layer in range(anatomy.layers)))
        cells = Cells(self.model, len(stays), "f16", "f16", listener=ear)
        try:
            cells.run(ids[0, stays].tolist(), 0, LIVE)
            read = _layers(cells)
            turns = anatomy.turning.at(stays - torch.arange(len(stays)))
            found = Observed(DynamicCache())
            for index in range(anatomy.layers):
                states = [torch.zeros(1, part.shape[1], count, anatomy.head) for part in (read[index].keys,) * 2]
                states[0][0, :, stays] = turns.to_place(read[index].keys[0], index)
                states[1][0, :, stays] = read[index].values[0]
                found.cache.update(states[0], states[1], index)
            if gone is None:
                self._hear(ear, found)
            return found
        finally:
            cells.close()

    def _hear(self, ear: _Ear, found: Observed) -> None:
        anatomy = self.model.anatomy
        for index in range(anatomy.layers):
            if index not in ear.rotated:
                raise CalibrationError(
                    f"the queries of {anatomy.name} models cannot be observed in llama.cpp; use choose='next'"
                )
            queries = torch.from_numpy(np.concatenate(ear.rotated[index])).view(-1, anatomy.heads, anatomy.head)
            found.layers[index] = Layer(anatomy.halves(queries).transpose(0, 1).contiguous(), anatomy.head**-0.5)
            if anatomy.norm(index)[0] is not None:
                plain = torch.from_numpy(np.concatenate(ear.plain[index])).view(-1, anatomy.heads, anatomy.head)
                found.unnormed[index] = anatomy.halves(plain)


class _Ear:
    """Keeps the queries of every layer as llama.cpp computes them: rotated, and (if wanted) as they were before their norm."""

    def __init__(self, before_norm: bool) -> None:
        self.before_norm = before_norm
        self.rotated: dict[int, list[np.ndarray[Any, Any]]] = {}
        self.plain: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._last: np.ndarray[Any, Any] | None = None

    def __call__(self, tensor: Any, asked: bool) -> bool:
        name = tensor_name(tensor)
        if not name.startswith(_QUERY) or not name[len(_QUERY) :].isdecimal():
            return not asked
        rotated = tensor_operation(tensor) == _ROTATED
        if asked:
            return rotated or self.before_norm
        layer = int(name[len(_QUERY) :])
        if not rotated:
            self._last = tensor_data(tensor)
            return True
        self.rotated.setdefault(layer, []).append(tensor_data(tensor))
        if self.before_norm and self._last is not None:
            self.plain.setdefault(layer, []).append(self._last)
            self._last = None
        return True


def _layers(cells: Cells) -> Layers:
    length = cells.end(LIVE)
    return Layers(Packed(cells.read([Span(0, length)]), cells.model.anatomy), length)
