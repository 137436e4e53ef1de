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
from kveraser.model.view import causal_lm
from kveraser.readers.calibration import LEAST_TOKENS, Calibration, calibrate, calibrate_hiding
from kveraser.readers.files import cached_file, read_calibration, write_calibration

KEPT_FROM = 1000
"""Tokens from which on a calibration is worth keeping."""

log = logging.getLogger(__name__)
_known: WeakKeyDictionary[nn.Module, Calibration] = WeakKeyDictionary()

Text = Callable[[], Sequence[int] | Tensor]
"""Gives ids of some text when asked."""


def remember(model: nn.Module, calibration: Calibration) -> None:
    """Use a calibration for a model from now on, in this process."""
    calibration.check(model)
    _known[causal_lm(model)] = calibration


def known_calibration(model: nn.Module) -> Calibration | None:
    """The calibration that is there for a model, in this process or in the cache folder; None when there is none."""
    base = causal_lm(model)
    if base not in _known:
        file = cached_file(base)
        if not file.exists():
            return None
        try:
            found = read_calibration(file)
            found.check(base)
        except CalibrationError as error:
            log.warning("%s; calibrating anew", error)
            return None
        _known[base] = found
    return _known[base]


def calibration_for(model: nn.Module, text: Text) -> Calibration:
    """The calibration of a model; made from `text` when there is none.

    One that is made from fewer than 256 tokens has no probes (`tells` is False), and only says how to hide slots.
    """
    found = known_calibration(model)
    if found is not None:
        return found
    ids = torch.as_tensor(text(), dtype=torch.long)
    count = len(ids)
    made = calibrate(model, ids) if count >= LEAST_TOKENS else calibrate_hiding(model, ids)
    if count >= KEPT_FROM:
        _known[causal_lm(model)] = made
        write_calibration(cached_file(model), made)
    return made
