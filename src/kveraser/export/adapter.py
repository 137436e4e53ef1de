"""The eraser as a GGUF LoRA adapter, as llama.cpp loads it.

Knows: GGUF files, an eraser's folder. Does not know about llama.cpp itself.

Beside the matrices the file holds what steering needs: window, repair, the backbone's fingerprint, and the checksum of
the PEFT file it was made from.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from kveraser.eraser import EraserConfig
from kveraser.eraser.adapter_files import CONFIG
from kveraser.eraser.config import FILE_NAME
from kveraser.errors import EraserMismatchError
from kveraser.export.names import Naming
from kveraser.export.source import EraserFiles
from kveraser.export.writing import check_file, write_out
from kveraser.files import appearing_whole, cache_folder
from kveraser.model.fingerprint import Fingerprint

FORMAT = 1
FloatType = Literal["f32", "f16"]
_NUMPY: dict[str, Any] = {"f32": np.float32, "f16": np.float16}


@dataclass(frozen=True)
class GgufEraser:
    """What a GGUF file says of the eraser in it.

    Attributes:
        file: the GGUF file.
        config: window, repair and the backbone's fingerprint.
        architecture: GGUF's name of the backbone's architecture.
        source_sha256: checksum of the `adapter_model.safetensors` it was made from.
        rank: of the LoRA.
        modules: number of adapted modules.
    """

    file: Path
    config: EraserConfig
    architecture: str
    source_sha256: str
    rank: int
    modules: int


def write_gguf_eraser(
    source: str | PathLike[str], file: str | PathLike[str], *, dtype: FloatType = "f32"
) -> GgufEraser:
    """Write the eraser of a folder as a GGUF adapter; read back and compared before it gets its name.

    Args:
        source: folder made by `KVEraser.save_pretrained`.
        file: to be written; an older one is replaced.
        dtype: of the matrices. llama.cpp rounds what is multiplied with float16 matrices to float16, too.

    Raises:
        EraserMismatchError: no eraser, or one of an architecture that has no known GGUF form.
        OptionError: `file` is a folder.
    """
    files, target = EraserFiles.read(source), Path(file)
    check_file(target)
    with appearing_whole(target) as partial:
        _write(files, partial, _NUMPY[dtype])
        _compare(files, partial, dtype)
    return read_gguf_eraser(target)


def exported_gguf(folder: Path) -> GgufEraser:
    """The GGUF form of an eraser's folder, made once and kept in the cache folder under the checksum of its files.

    Raises:
        EraserMismatchError: the folder holds no eraser, or a damaged one.
    """
    files = EraserFiles.read(folder)
    texts = [(folder / name).read_bytes() for name in (FILE_NAME, CONFIG)]
    key = hashlib.sha256(b"\0".join([files.sha256.encode(), *texts])).hexdigest()
    file = cache_folder() / "gguf-erasers" / f"{key[:16]}.gguf"
    if file.exists():
        with suppress(EraserMismatchError):  # damaged: made anew
            found = read_gguf_eraser(file)
            if found.source_sha256 == files.sha256:
                return found
    return write_gguf_eraser(folder, file)


def _write(files: EraserFiles, file: Path, dtype: Any) -> None:
    config, naming = files.config, Naming(files.config.fingerprint.shape)
    writer = GGUFWriter(str(file), naming.architecture.name)
    writer.add_type("adapter")
    base = files.lora_config.get("base_model_name_or_path")
    writer.add_name(f"kveraser eraser{f' for {base}' if base else ''}")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(files.lora_config["lora_alpha"]))
    writer.add_uint32("kveraser.format", FORMAT)
    if config.window is not None:
        writer.add_array("kveraser.window", list(config.window))
    writer.add_uint32("kveraser.repair", config.repair_next)
    writer.add_string("kveraser.fingerprint", json.dumps(asdict(config.fingerprint), sort_keys=True))
    writer.add_string("kveraser.source.sha256", files.sha256)
    for module in sorted(files.weights):
        a, b = _matrices(files, naming, module)
        writer.add_tensor(f"{naming.tensor(module)}.lora_a", a.astype(dtype))
        writer.add_tensor(f"{naming.tensor(module)}.lora_b", b.astype(dtype))
    write_out(writer)


def _matrices(files: EraserFiles, naming: Naming, module: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """A and B in float32 as llama.cpp wants them: it multiplies their product with alpha / rank."""
    a, b = (matrix.float().numpy() for matrix in files.weights[module])
    factor = files.scaling(module) / (float(files.lora_config["lora_alpha"]) / a.shape[0])
    return a, naming.rows(module, b if factor == 1 else b * np.float32(factor))


def _compare(files: EraserFiles, file: Path, dtype: FloatType) -> None:
    """Raise unless the file says what the folder says."""
    written = read_gguf_eraser(file)
    config = files.config
    if (written.config.window, written.config.repair) != (config.window, config.repair_next):
        raise EraserMismatchError(f"{file} was not written as meant: {written.config}")
    if written.config.fingerprint != config.fingerprint or written.source_sha256 != files.sha256:
        raise EraserMismatchError(f"{file} was not written as meant: another fingerprint or checksum came back")
    naming = Naming(config.fingerprint.shape)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in GGUFReader(str(file)).tensors}
    tolerance = 0.0 if dtype == "f32" else 1e-3
    for module, (a, b) in files.weights.items():
        name = naming.tensor(module)
        back_a = tensors.pop(f"{name}.lora_a").astype(np.float32)
        back_b = naming.rows_back(module, tensors.pop(f"{name}.lora_b").astype(np.float32))
        product = a.shape[0] / float(files.lora_config["lora_alpha"]) * files.scaling(module)
        for mine, theirs in ((a.float().numpy(), back_a), (b.float().numpy() * np.float32(product), back_b)):
            if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=tolerance, atol=tolerance * 1e-3):
                raise EraserMismatchError(f"{file} was not written as meant: {name} reads back as another matrix")
    if tensors:
        raise EraserMismatchError(f"{file} holds tensors nobody asked for: {', '.join(sorted(tensors)[:3])}")


def read_gguf_eraser(file: str | PathLike[str]) -> GgufEraser:
    """Read what a GGUF adapter says of itself.

    Raises:
        EraserMismatchError: not a GGUF file, not an adapter, not made by kveraser, or of a newer format.
    """
    place = Path(file)
    try:
        reader = GGUFReader(str(place))
        values = {name: field.contents() for name, field in reader.fields.items()}
        if values.get("general.type") != "adapter" or "kveraser.format" not in values:
            raise EraserMismatchError(f"{place} is no eraser; make one with `kveraser export gguf`")
        if values["kveraser.format"] > FORMAT:
            raise EraserMismatchError(
                f"{place} has format {values['kveraser.format']}, this version reads {FORMAT}; update kveraser"
            )
        ranks = {int(t.shape[0]) for t in reader.tensors if t.name.endswith(".lora_b")}
        kinds = {t.tensor_type for t in reader.tensors}
        if not ranks or not kinds <= {GGMLQuantizationType.F32, GGMLQuantizationType.F16}:
            raise EraserMismatchError(f"{place} holds no float32 or float16 LoRA matrices")
        window = values.get("kveraser.window")
        config = EraserConfig(
            Fingerprint(**json.loads(values["kveraser.fingerprint"])),
            None if window is None else (int(window[0]), int(window[1])),
            int(values["kveraser.repair"]),
            "next",
        )
        return GgufEraser(
            place,
            config,
            str(values["general.architecture"]),
            str(values["kveraser.source.sha256"]),
            max(ranks),
            len(reader.tensors) // 2,
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        if isinstance(error, EraserMismatchError):
            raise
        raise EraserMismatchError(f"{place} cannot be read as a GGUF adapter: {error!r}") from error
