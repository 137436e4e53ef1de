"""The calibration of a model: from the cache folder, or made now and kept there.

Knows: where calibrations are kept. Does not know how they are made or used. One that was made from little text is used
once and not kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kveraser.errors import CalibrationError
from kveraser.readers.calibration import LEAST_TOKENS, Calibration, calibrate, calibrate_hiding
from kveraser.readers.files import cached_file, read_calibration, write_calibration
from kveraser.readers.source import Source, as_source

KEPT_FROM = 1000
"""Tokens from which on a calibration is worth keeping."""

log = logging.getLogger(__name__)
_known: WeakKeyDictionary[object, Calibration] = WeakKeyDictionary()

Text = Callable[[], Sequence[int] | Tensor]
"""Gives ids of some text when asked."""


def remember(model: nn.Module | Source, calibration: Calibration) -> None:
    """Use a calibration for a model from now on, in this process."""
    calibration.check(model)
    _known[as_source(model).owner] = calibration


def known_calibration(model: nn.Module | Source) -> Calibration | None:
    """The calibration that is there for a model, in this process or in the cache folder; None when there is none."""
    source = as_source(model)
    if source.owner not in _known:
        file = cached_file(source)
        if not file.exists():
            return None
        try:
            found = read_calibration(file)
            found.check(source)
        except CalibrationError as error:
            log.warning("%s; calibrating anew", error)
            return None
        _known[source.owner] = found
    return _known[source.owner]


def calibration_for(model: nn.Module | Source, text: Text) -> Calibration:
    """The calibration of a model; made from `text` when there is none.

    One that is made from fewer than 256 tokens has no probes (`tells` is False), and only says how to hide slots.
    """
    source = as_source(model)
    found = known_calibration(source)
    if found is not None:
        return found
    ids = torch.as_tensor(text(), dtype=torch.long)
    count = len(ids)
    made = calibrate(source, ids) if count >= LEAST_TOKENS else calibrate_hiding(source, ids)
    if count >= KEPT_FROM:
        _known[source.owner] = made
        write_calibration(cached_file(source), made, private=True)
    return made
