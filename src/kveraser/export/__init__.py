"""An eraser in other programs' formats: a GGUF LoRA adapter, a plain PEFT folder; and its backbone as GGUF.

All are made from the eraser's own folder, so that one file serves every engine: what is written names its source by
checksum; an adapter is read back and compared before it appears under its name, a folder once it is written.

Knows: an eraser's folder, GGUF, PEFT. Does not know about caches, or who will read what it writes.
"""

from kveraser.export.adapter import GgufEraser, exported_gguf, read_gguf_eraser, write_gguf_eraser
from kveraser.export.backbone import write_gguf_backbone
from kveraser.export.folder import write_peft_folder
from kveraser.export.source import EraserFiles

__all__ = [
    "EraserFiles",
    "GgufEraser",
    "exported_gguf",
    "read_gguf_eraser",
    "write_gguf_backbone",
    "write_gguf_eraser",
    "write_peft_folder",
]
