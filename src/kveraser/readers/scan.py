"""Who has read a span, and which keys a reader needs: from the states in a cache, without a pass of the model.

Knows: probes, masses, caches. Does not know which tokens will be chosen.

Two looks, since telling a token's queries is what costs: a thin one over the whole suffix, in the layer that tells most
and from its own keys and values; and a close one at some hundred candidates, in up to five layers from their neighbors'
states as well.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kveraser.cache import Tokens
from kveraser.readers.calibration import Calibration
from kveraser.readers.masses import Landscape, span_mass
from kveraser.readers.probes import Probe, features
from kveraser.readers.source import Source
from kveraser.spans import Span

CHUNK = 2048
"""Tokens that the thin look takes at a time, and slots that chosen tokens are asked for."""
MOST_SCORES = 1 << 26
"""Attention scores that are held at a time."""


@dataclass(frozen=True)
class Scene:
    """A cache in which spans are to be erased, as the probes see it.

    Attributes:
        source: the model and the cache's states.
        spans: to be erased, in order.
        lands: for each row, what its tokens may have attended to.
    """

    source: Source
    tokens: Tokens
    spans: tuple[Span, ...]
    calibration: Calibration
    lands: tuple[Landscape, ...]

    @classmethod
    def of(cls, source: Source, tokens: Tokens, spans: Sequence[Span], erased: Sequence[Span],
           calibration: Calibration) -> Scene:  # fmt: skip
        """From a cache; `erased` are slots that hold steering states already."""
        device = tokens.ids.device
        live = torch.ones(tokens.ids.shape, dtype=torch.bool, device=device)
        if tokens.mask is not None:
            live &= tokens.mask.bool()
        for span in erased:
            live[:, span.slice] = False
        lands = []
        for row in live:
            own = torch.cat([torch.arange(span.start, span.end, device=device) for span in spans])
            lands.append(Landscape.of(row, own[row[own]]))
        ready = calibration.on(device, source.dtype)
        return cls(source, tokens, tuple(spans), ready, tuple(lands))

    @property
    def suffix(self) -> Tensor:
        """The slots behind the first span that are live in any row and not to be erased, in order."""
        live = torch.stack([land.live for land in self.lands]).any(0)
        for span in self.spans:
            live[span.slice] = False
        live[: self.spans[0].start] = False
        return live.nonzero()[:, 0]

    def positions(self, row: int, slots: Tensor) -> Tensor:
        """Positions of the slots in a row."""
        places = self.tokens.positions
        return slots if places is None else places[row, slots]

    def queries(self, probe: Probe, row: int, slots: Tensor, *, run: bool) -> Tensor:
        """Told queries of tokens, `(heads, tokens, head_dim)`."""
        turns = self.source.turning.at(self.positions(row, slots))
        where: Tensor | slice = slice(int(slots[0]), int(slots[-1]) + 1) if run else slots
        read = features(self.source.layers, probe.sources, row, where, turns)
        return probe.queries(read, turns, *self.source.norm(probe.layer))

    def thin(self) -> Tensor:
        """Masses of all slots of the suffix by the thin look, `(batch, suffix)`, the largest of any head that it tells."""
        assert self.calibration.scan is not None
        probe = self.calibration.scan
        first, last = self.spans[0].start, self.tokens.length
        found = torch.zeros(self.tokens.ids.shape, device=self.tokens.ids.device)
        lands = [land.thinned() for land in self.lands]
        step = min(_fitting(probe.heads, max(land.columns for land in lands)), CHUNK)
        for row, land in enumerate(lands):
            keys = self.source.layers[probe.layer].keys[row]
            for start in range(first, last, step):
                slots = torch.arange(start, min(start + step, last), device=keys.device)
                told = self.queries(probe, row, slots, run=True)
                mass, _ = span_mass(told, slots, keys, probe.scaling, land, run=True, key_heads=probe.key_heads)
                found[row, slots] = mass.amax(0)
        return found[:, self.suffix]

    def close(self, slots: Tensor) -> Tensor:
        """Masses of some slots by the close look, `(batch, slots)`, the largest of any head, mean over layers."""
        return torch.cat([self._close(part) for part in self._parts(slots)], -1)

    def _close(self, slots: Tensor) -> Tensor:
        found = torch.zeros(len(self.lands), len(slots), device=slots.device)
        for row, probe in self._probes():
            told = self.queries(probe, row, slots, run=False)
            keys = self.source.layers[probe.layer].keys[row]
            mass, _ = span_mass(told, slots, keys, probe.scaling, self.lands[row], run=False)
            found[row] += mass.amax(0)
        return found / len(self.calibration.probes)

    def everywhere(self) -> Tensor:
        """Masses of all slots of the suffix in all layers that are looked at, `(batch, suffix)`."""
        return self.close(self.suffix)

    def _parts(self, slots: Tensor) -> tuple[Tensor, ...]:
        """Some tokens, no more at a time than can be looked at closely in little memory, however long the spans are."""
        heads = max(probe.heads for probe in self.calibration.probes)
        parts: tuple[Tensor, ...] = slots.split(_fitting(heads, max(CHUNK, *(land.columns for land in self.lands))))
        return parts

    def needed(self, chosen: Tensor, count: int) -> Tensor:
        """The `count` slots that any of the chosen ones attends to most, `(count,)`, in order.

        What counts is the largest attention that any head of the layers that are looked at pays from any of them. Every second
        one is asked, the last among them: neighbors need the same.
        """
        most = torch.full((self.tokens.length,), -torch.inf, device=chosen.device)
        for part in self._parts(chosen[(len(chosen) + 1) % 2 :: 2]):
            self._look_back(part, most)
        able = torch.stack([land.live for land in self.lands]).any(0)
        for span in self.spans:
            able[span.slice] = False
        most[~able] = -torch.inf
        best = most.topk(min(count, int(able.sum()))).indices
        return best[most[best] > -torch.inf].sort().values

    def _look_back(self, chosen: Tensor, most: Tensor) -> None:
        """Raise `most`, `(slots,)`, to the largest attention, as a logarithm, that any head pays from any of the tokens."""
        length, listed = self.tokens.length, chosen.tolist()
        for row, probe in self._probes():
            land, layer = self.lands[row], self.source.layers[probe.layer]
            told = self.queries(probe, row, chosen, run=False)
            _, whole = span_mass(told, chosen, layer.keys[row], probe.scaling, land, run=False)
            rows = (told * probe.scaling).to(layer.keys.dtype)
            groups = layer.keys.shape[1]
            for start in range(0, length, CHUNK):
                end = min(start + CHUNK, length)
                later = bisect_left(listed, start)  # those before it see nothing of this stretch
                if later == len(listed):
                    break
                seen = layer.keys[row][:, start:end]
                told_rows = rows[:, later:].reshape(groups, -1, rows.shape[-1]).transpose(-1, -2)
                less = -whole[:, later:].reshape(groups, 1, -1).to(seen.dtype)
                scores = torch.baddbmm(less, seen, told_rows)  # (groups, slots, heads of a group * tokens)
                within = bisect_left(listed, end) - later  # of whom this stretch holds slots that come after
                if within:
                    behind = torch.arange(start, end, device=chosen.device)[:, None] > chosen[later : later + within]
                    unseen = scores.view(groups, end - start, -1, len(chosen) - later)[..., :within]
                    unseen.masked_fill_(behind[:, None], -torch.inf)
                most[start:end] = torch.maximum(most[start:end], scores.amax(-1).amax(0).float())

    def _probes(self) -> Iterator[tuple[int, Probe]]:
        for probe in self.calibration.probes:
            for row in range(len(self.lands)):
                yield row, probe


def _fitting(heads: int, columns: int) -> int:
    """Of how many tokens the scores are held at a time; one is looked at in any case."""
    return max(MOST_SCORES // (heads * columns), 1)
