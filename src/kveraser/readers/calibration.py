"""What has to be known of a model before one can tell who has read a span: probes, the layers to look at, neutral keys.

Knows: how to find these from any text in a few forwards. Does not know where they are kept.

Layers are those whose attention to a span best tells by how much the late states of a token change when the span was not
there: two prefills of the same text, one of them with some spans masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from kveraser.errors import CalibrationError
from kveraser.model.fingerprint import Fingerprint
from kveraser.model.view import as_batch
from kveraser.readers.masses import Landscape, span_mass
from kveraser.readers.neutral_keys import neutral_keys
from kveraser.readers.observing import Observed
from kveraser.readers.probes import Probe, Target, Turning, features, fit_probe
from kveraser.readers.source import Source, as_source

MOST_TOKENS = 2000
LEAST_TOKENS = 256
LAYERS = 5
RANK = 128
SCAN_SHARE, LEAST_HEADS = 4, 3
"""The first look takes a quarter of a layer's heads, but at least three."""
LEAST_EXPLAINED = 0.5
"""Below this share of the queries' variance, probes say too little to choose by."""
_SPAN = 32
_AFTER = 8
_LATE = 2 / 3
_TOP = 0.1


@dataclass(frozen=True)
class Calibration:
    """Everything that telling readers and writing neutral states needs of one model.

    Attributes:
        fingerprint: of the model.
        scan: the probe of some heads of one layer from its own keys and values, for the first look at a whole suffix; None
            without.
        probes: those of up to five layers from their neighbors' states as well, the best layer first.
        neutral: `(layers, kv_heads, head_dim)` float32, keys that no query likes, as at position 0.
    """

    fingerprint: Fingerprint
    scan: Probe | None
    probes: tuple[Probe, ...]
    neutral: Tensor

    @property
    def explained(self) -> float:
        """The smallest share of the queries' variance that one of the probes explains; 0 without probes."""
        return min(probe.explained for probe in (self.scan, *self.probes)) if self.scan is not None else 0.0

    @property
    def tells(self) -> bool:
        """Whether the probes say enough to choose by."""
        return self.explained >= LEAST_EXPLAINED

    def on(self, device: torch.device, dtype: torch.dtype) -> Calibration:
        """The same with its probes there, ready for use; they are moved once."""
        known = _moved.setdefault(self, {})
        if (device, dtype) not in known:
            scan = None if self.scan is None else self.scan.to(device, dtype)
            known[device, dtype] = replace(
                self, scan=scan, probes=tuple(probe.to(device, dtype) for probe in self.probes)
            )
        found: Calibration = known[device, dtype]
        return found

    def check(self, model: nn.Module | Source) -> None:
        """Raise `CalibrationError` unless it is of this model."""
        source = as_source(model)
        difference = self.fingerprint.difference_to(source.fingerprint)
        if difference is not None:
            raise CalibrationError(
                f"these probes are of another model than this {type(source.owner).__name__}: {difference}; "
                "calibrate anew"
            )


_moved = WeakIdKeyDictionary()
"""Calibration -> device and type -> the calibration there."""


@torch.no_grad()
def calibrate(model: nn.Module | Source, ids: Tensor | list[int]) -> Calibration:
    """Calibrate on a text; takes about as long as prefilling it three times.

    Args:
        model: of transformers, or what an engine shows of its own.
        ids: `(tokens,)` of any text; up to 2,000 are used.

    Raises:
        CalibrationError: fewer than 256 tokens, or a model that cannot be listened to.
    """
    source = as_source(model)
    text = as_batch(ids, source.device)[:1, :MOST_TOKENS]
    count = text.shape[1]
    if count < LEAST_TOKENS:
        raise CalibrationError(
            f"{count} tokens are too little to calibrate on; give a text of at least {LEAST_TOKENS} (any text will do)"
        )
    spans = _spans(count)
    text, gone = lesson(text)
    seen = source.observe(text)
    changes = _changes(seen, source.observe(text, gone))
    slots = torch.arange(count, device=text.device)
    counted = ~gone & (slots >= spans[0] + _SPAN)
    for start in spans:
        counted[start : start + _SPAN + _AFTER] = False
    looks = _look_at(seen, gone)
    worth = [_worth(mass.amax(0)[counted], changes[counted]) for mass, _ in looks]
    total = len(worth)
    able = range(total // 2, max(total * 4 // 5, total // 2) + 1)
    best = sorted(able, key=lambda index: -worth[index])[:LAYERS]
    turning = source.turning
    turns = turning.at(slots)

    def fit(layer: int, sources: tuple[int, ...], heads: Sequence[int] | None = None) -> Probe:
        read = features(seen.cache.layers, sources, 0, slice(None), turns)
        target = Target.of(*source.norm(layer), seen, layer, turns)
        if heads is None:
            return fit_probe(read, target, layer, sources, RANK, turning, slots)
        of_each = target.queries.shape[0] // seen.cache.layers[layer].keys.shape[1]
        probe = fit_probe(read, target.of_heads(heads), layer, sources, RANK, turning, slots)
        kept = heads if probe.heads == len(heads) else range(probe.heads)
        return replace(probe, key_heads=tuple(head // of_each for head in kept))

    def around(layer: int) -> tuple[int, ...]:
        return tuple(index for index in (layer - 1, layer, layer + 1) if 0 <= index < total)

    return Calibration(
        fingerprint=source.fingerprint,
        scan=fit(best[0], (best[0],), _telling(looks[best[0]][0][:, counted], changes[counted])),
        probes=tuple(fit(layer, around(layer)) for layer in best),
        neutral=_neutral(seen, [whole for _, whole in looks], turning),
    )


def lesson(text: Tensor) -> tuple[Tensor, Tensor]:
    """What is run to calibrate on a text `(1, tokens)`: its ids, changed a little, and which of them are left out the second time."""
    spans = _spans(text.shape[1])
    gone = torch.zeros(text.shape[1], dtype=torch.bool, device=text.device)
    for start in spans:
        gone[start : start + _SPAN] = True
    return _repeating(text, spans), gone


@torch.no_grad()
def calibrate_hiding(model: nn.Module | Source, ids: Tensor | list[int]) -> Calibration:
    """A calibration without probes, which takes any text: it only says how to hide slots.

    Args:
        ids: `(tokens,)`, at least one.
    """
    source = as_source(model)
    if not source.writes_neutral:
        return Calibration(source.fingerprint, None, (), torch.empty(0))
    text = as_batch(ids, source.device)[:1, :MOST_TOKENS]
    seen = source.observe(text)
    looks = _look_at(seen, torch.zeros(text.shape[1], dtype=torch.bool, device=text.device))
    return Calibration(source.fingerprint, None, (), _neutral(seen, [whole for _, whole in looks], source.turning))


def _look_at(seen: Observed, gone: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In every layer, what the true queries gave to some slots, and the logarithms of the softmax denominators."""
    land = Landscape.of(torch.ones_like(gone), gone.nonzero()[:, 0])
    slots = torch.arange(len(gone), device=gone.device)
    return [
        span_mass(layer.queries.float(), slots, states.keys[0].float(), layer.scaling, land, run=True)
        for layer, states in ((seen.layers[index], states) for index, states in enumerate(seen.cache.layers))
    ]


def _neutral(seen: Observed, denominators: list[Tensor], turning: Turning) -> Tensor:
    layers = [seen.layers[index] for index in range(len(seen.cache.layers))]
    slots = torch.arange(seen.cache.get_seq_length(), device=denominators[0].device)
    groups = seen.cache.layers[0].keys.shape[1]
    queries, scalings = [layer.queries for layer in layers], [layer.scaling for layer in layers]
    return neutral_keys(queries, denominators, scalings, groups, turning, slots)


def _spans(count: int) -> list[int]:
    """Where the spans are that are left out: four of them, or one in a short text."""
    places = 4 if count >= 4 * LEAST_TOKENS else 1
    return [int(count * (index + 0.3) / (places + 0.3)) for index in range(places)]


def _repeating(text: Tensor, spans: list[int]) -> Tensor:
    """The text with what is to be left out said again later on: whoever repeats a thing has read it."""
    said = text.clone()
    for start, end in pairwise([*spans, text.shape[1]]):
        later = start + (end - start) * 2 // 3
        room = min(_SPAN, text.shape[1] - later)
        said[:, later : later + room] = text[:, start : start + room]
    return said


def _changes(one: Observed, other: Observed) -> Tensor:
    """By how much the late states of every token differ, `(tokens,)`."""
    late = range(int(len(one.cache.layers) * _LATE), len(one.cache.layers))
    found = torch.zeros(one.cache.get_seq_length(), device=one.cache.layers[0].keys.device)
    for index in late:
        mine, theirs = one.cache.layers[index], other.cache.layers[index]
        for a, b in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            size = a[0].float().square().sum((0, 2))
            found += (a[0].float() - b[0].float()).square().sum((0, 2)) / size.mean().clamp(min=1e-9)
    return found.sqrt()


def _telling(masses: Tensor, changes: Tensor) -> list[int]:
    """The few heads of a layer that together tell most, one after the other; masses `(heads, tokens)`."""
    found: list[int] = []
    left = list(range(len(masses)))
    while left and len(found) < max(len(masses) // SCAN_SHARE, min(len(masses), LEAST_HEADS)):
        best = max(left, key=lambda head: _worth(masses[[*found, head]].amax(0), changes))
        found.append(best)
        left.remove(best)
    return sorted(found)


def _worth(masses: Tensor, changes: Tensor) -> float:
    """How well masses tell changes: their correlation, and the share of change in the tokens that they name first."""
    top = max(int(_TOP * len(masses)), 1)
    caught = changes[masses.topk(top).indices].sum() / changes.topk(top).values.sum().clamp(min=1e-9)
    both = torch.stack([masses.argsort().argsort().float(), changes.argsort().argsort().float()])
    return float(torch.corrcoef(both)[0, 1].nan_to_num() + caught)
