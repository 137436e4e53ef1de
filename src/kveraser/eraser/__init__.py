"""Erasers: the LoRA and its files (`eraser`), its settings (`config`), states that nothing attends to (`neutral`), the
erasers that ship (`shipped`).

Knows: LoRA, PEFT, what a passing eraser writes. Does not know about spans, methods or who has read what.
"""

from kveraser.eraser.config import CHOICES, Choose, EraserConfig
from kveraser.eraser.eraser import KVEraser
from kveraser.eraser.injection import target_linears
from kveraser.eraser.neutral import write_neutral
from kveraser.eraser.shipped import default_eraser, shipped_eraser, shipped_erasers

__all__ = [
    "CHOICES",
    "Choose",
    "EraserConfig",
    "KVEraser",
    "default_eraser",
    "shipped_eraser",
    "shipped_erasers",
    "target_linears",
    "write_neutral",
]
