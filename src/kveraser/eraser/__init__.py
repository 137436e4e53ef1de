"""The LoRA eraser: its weights and files (`eraser`), its settings (`config`), the ones that ship (`shipped`)."""

from kveraser.eraser.config import EraserConfig, Fingerprint
from kveraser.eraser.eraser import KVEraser, target_linears
from kveraser.eraser.shipped import shipped_eraser, shipped_erasers

__all__ = ["EraserConfig", "Fingerprint", "KVEraser", "shipped_eraser", "shipped_erasers", "target_linears"]
