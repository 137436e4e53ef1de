"""The erasers that come with the package.

Knows: the folder `shipped/`, one PEFT folder per backbone. Does not know how they were trained (their cards say).
"""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn

from kveraser.eraser.config import FILE_NAME, EraserConfig
from kveraser.eraser.eraser import KVEraser
from kveraser.errors import EraserMismatchError
from kveraser.model.view import causal_lm

FOLDER = Path(__file__).parent / "shipped"

_loaded: WeakKeyDictionary[nn.Module, KVEraser] = WeakKeyDictionary()
_neutral: WeakKeyDictionary[nn.Module, KVEraser] = WeakKeyDictionary()


def shipped_erasers() -> dict[str, Path]:
    """Name of the backbone -> folder of its eraser."""
    return {file.parent.name: file.parent for file in sorted(FOLDER.glob(f"*/{FILE_NAME}"))}


def shipped_eraser(model: nn.Module) -> KVEraser:
    """The eraser that ships for a model, recognised by its weights; loaded once per model.

    Raises:
        EraserMismatchError: none ships for it.
    """
    base = causal_lm(model)
    if base not in _loaded:
        for folder in shipped_erasers().values():
            if EraserConfig.read(folder / FILE_NAME).fingerprint.difference(base) is None:
                _loaded[base] = KVEraser.from_pretrained(folder, base)
                break
        else:
            name = base.config._name_or_path or type(base).__name__
            raise EraserMismatchError(
                f"no eraser ships for {name} (there is one for: {', '.join(shipped_erasers()) or 'none'}); "
                "use method='full-recompute', give one with eraser=KVEraser.from_pretrained(...), "
                "or train one with `kveraser train`"
            )
    return _loaded[base]


def default_eraser(model: nn.Module) -> KVEraser:
    """What `kveraser` erases with when no eraser is given: the one that ships for the model where that is better on
    held-out examples, else a neutral one. Made once per model.

    Raises:
        UnsupportedCacheError: a model whose cache cannot be edited.
    """
    base = causal_lm(model)
    try:
        trained = shipped_eraser(base)
    except EraserMismatchError:
        trained = None
    if trained is not None and trained.config.preferred:
        return trained
    if base not in _neutral:
        neutral = KVEraser.neutral(base)
        neutral.calibration = None if trained is None else trained.calibration
        _neutral[base] = neutral
    return _neutral[base]
