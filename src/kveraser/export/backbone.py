"""The backbone as a GGUF file without quantisation: what an engine computes with the very weights an eraser was made for.

Knows: GGUF files. Does not know about erasers.

Everything but the tensors is taken over from a quantised GGUF file, tokenizer and architecture; the tensors are replaced
by their de-quantised values, which are those that `load_backbone` gives to transformers.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, dequantize

from kveraser.errors import BackboneError
from kveraser.export.adapter import FloatType
from kveraser.export.writing import check_file, write_out
from kveraser.files import appearing_whole

_FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16}
_OWN = ("general.architecture", "general.file_type", "general.quantization_version")


def write_gguf_backbone(
    source: str | PathLike[str], file: str | PathLike[str], *, dtype: FloatType = "f16"
) -> dict[str, int]:
    """Write a GGUF file with the de-quantised weights of another one; it appears whole or not at all.

    Args:
        source: GGUF file of any quantisation.
        file: to be written; an older one is replaced.
        dtype: of the matrices; norms and other vectors stay float32.

    Returns:
        The numbers of tensors and of bytes written.

    Raises:
        BackboneError: the source cannot be read or de-quantised.
        OptionError: `file` is a folder.
    """
    target = Path(file)
    check_file(target)
    try:
        with appearing_whole(target) as partial:
            count = _write(GGUFReader(str(source)), partial, dtype)
    except (OSError, ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise BackboneError(f"cannot write the weights of {source} as {dtype}: {error}") from error
    return {"tensors": count, "bytes": target.stat().st_size}


def _write(reader: GGUFReader, file: Path, dtype: FloatType) -> int:
    writer = GGUFWriter(str(file), str(reader.fields["general.architecture"].contents()), use_temp_file=False)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in _OWN:
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub)
    writer.add_file_type(_FILE_TYPES[dtype])
    for tensor in reader.tensors:
        values: Any = dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        narrow = dtype == "f16" and len(shape) > 1
        writer.add_tensor(tensor.name, values.reshape(shape).astype(np.float16 if narrow else np.float32))
    write_out(writer)
    return len(reader.tensors)
