"""kveraser: erase a span from a language model's context after it has been processed.

Knows: the public names and where each is. Does not know how any of them works.
"""

from kveraser.context import ErasableContext
from kveraser.edit import erase, readers, reading, replace, restore
from kveraser.eraser import KVEraser
from kveraser.errors import (
    BackboneError,
    CacheMismatchError,
    CalibrationError,
    ContextError,
    EraserMismatchError,
    KVEraserError,
    OptionError,
    RestoreError,
    SessionFileError,
    SpanError,
    UnsupportedCacheError,
)
from kveraser.methods import (
    AttentionGuidedRepair,
    Auto,
    DeleteAndShift,
    EraseMethod,
    EraseReceipt,
    FullRecompute,
    LocalSuffixRepair,
    NoErase,
    SelectiveRecompute,
    Steering,
    methods,
)
from kveraser.model.backbone import load_backbone
from kveraser.spans import Span

__version__ = "0.1.0"

__all__ = [
    "AttentionGuidedRepair",
    "Auto",
    "BackboneError",
    "CacheMismatchError",
    "CalibrationError",
    "ContextError",
    "DeleteAndShift",
    "ErasableContext",
    "EraseMethod",
    "EraseReceipt",
    "EraserMismatchError",
    "FullRecompute",
    "KVEraser",
    "KVEraserError",
    "LocalSuffixRepair",
    "NoErase",
    "OptionError",
    "RestoreError",
    "SelectiveRecompute",
    "SessionFileError",
    "Span",
    "SpanError",
    "Steering",
    "UnsupportedCacheError",
    "erase",
    "load_backbone",
    "methods",
    "readers",
    "reading",
    "replace",
    "restore",
]
