"""A GGUF model in llama.cpp: loading it, what can be edited of it, and erasers for it.

Knows: llama.cpp's models and adapters. Does not know about caches.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from kveraser.engines.llama_cpp.anatomy import Anatomy
from kveraser.engines.llama_cpp.library import captured, lib, said
from kveraser.engines.llama_cpp.tokenizer import LlamaCppTokenizer
from kveraser.engines.llama_cpp.weights import gguf_fingerprint
from kveraser.eraser import EraserConfig, shipped_erasers
from kveraser.eraser.config import FILE_NAME
from kveraser.errors import BackboneError, EraserMismatchError, OptionError, UnsupportedCacheError
from kveraser.export import GgufEraser, exported_gguf, read_gguf_eraser
from kveraser.model.backbone import embedded_gguf
from kveraser.readers import FILE_NAME as READERS
from kveraser.readers import Calibration, read_calibration

_ROPES = (0, 2)  # neighboring and half-split dimensions; multi-dimensional positions and none are not moved here


@dataclass(frozen=True)
class NeutralEraser:
    """An eraser without adapter; `repair` readers are recomputed (None: by the span's length), which `calibration` tells (None
    leaves it to the cache folder or the first erase)."""

    repair: int | None = None
    calibration: Calibration | None = None


class LlamaCppModel:
    """A model that llama.cpp has loaded, used read-only by any number of contexts.

    Args:
        file: GGUF file; None takes the embedded default.
        threads: for contexts on it; None takes the number of cores.
        gpu_layers: layers to keep on a GPU, where the library was built with one; -1 for all.

    Raises:
        BackboneError: not there, or not loadable.
        UnsupportedCacheError: a model whose cache cannot be edited.
    """

    def __init__(
        self, file: str | PathLike[str] | None = None, *, threads: int | None = None, gpu_layers: int = -1
    ) -> None:
        self.file = Path(file) if file is not None else embedded_gguf()
        if not self.file.is_file():
            raise BackboneError(f"there is no GGUF file {self.file}")
        self._adapters: dict[tuple[str, str], Any] = {}
        self.threads = threads or os.cpu_count() or 1
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        with captured() as messages:
            self.handle: Any = lib.llama_model_load_from_file(str(self.file).encode(), parameters)
        if not self.handle:
            raise BackboneError(f"llama.cpp cannot load {self.file}: {said(messages)}")
        self.close = weakref.finalize(self, _free, self.handle)
        try:
            self._check()
            self.tokenizer = LlamaCppTokenizer(
                lib.llama_model_get_vocab(self.handle), lib.llama_model_chat_template(self.handle, None)
            )
        except BaseException:
            self.close()
            raise
        self.vocabulary = len(self.tokenizer)

    def __repr__(self) -> str:
        return f"LlamaCppModel({self.file.name!r}, {self.description})"

    @property
    def description(self) -> str:
        """Architecture, size and quantisation, as llama.cpp puts it."""
        buffer = ctypes.create_string_buffer(256)
        lib.llama_model_desc(self.handle, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @property
    def trained_length(self) -> int:
        """Tokens of the longest context in training."""
        return int(lib.llama_model_n_ctx_train(self.handle))

    @property
    def head_size(self) -> int:
        """Dimensions of a key."""
        given = self.metadata(f"{self.metadata('general.architecture')}.attention.key_length")
        heads = int(lib.llama_model_n_head(self.handle))
        return int(given) if given else int(lib.llama_model_n_embd(self.handle)) // heads

    @cached_property
    def anatomy(self) -> Anatomy:
        """What has to be known to read its states."""
        layers, heads = int(lib.llama_model_n_layer(self.handle)), int(lib.llama_model_n_head(self.handle))
        return Anatomy(self.file, layers, heads, self.head_size)

    @property
    def values_per_token(self) -> int:
        """Numbers in one token's keys, over all layers; its values have as many."""
        return int(lib.llama_model_n_layer(self.handle) * lib.llama_model_n_head_kv(self.handle)) * self.head_size

    def metadata(self, key: str) -> str | None:
        """A value of the file's metadata as text."""
        buffer = ctypes.create_string_buffer(4096)
        length = int(lib.llama_model_meta_val_str(self.handle, key.encode(), buffer, len(buffer)))
        return None if length < 0 else buffer.value.decode("utf-8", "replace")

    def identity(self) -> dict[str, Any]:
        """What tells this model from others in a saved session."""
        sizes = {"parameters": lib.llama_model_n_params(self.handle), "bytes": lib.llama_model_size(self.handle)}
        return {
            "model": self.description,
            "vocabulary": self.vocabulary,
            **sizes,
            "name": self.metadata("general.name"),
        }

    def _check(self) -> None:
        """Refuse what the calls of `cells` would not survive, or would get wrong."""
        architecture = self.metadata("general.architecture")
        reasons = {
            "a sliding window": lib.llama_model_n_swa(self.handle) > 0,
            "a recurrent state": lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle),
            "an encoder": lib.llama_model_has_encoder(self.handle) or not lib.llama_model_has_decoder(self.handle),
            "compressed keys (MLA)": bool(self.metadata(f"{architecture}.attention.kv_lora_rank")),
            "no plain rotary positions": lib.llama_model_rope_type(self.handle) not in _ROPES,
        }
        found = [reason for reason, there in reasons.items() if there]
        if found:
            raise UnsupportedCacheError(
                f"{self.file.name} ({architecture}) has {' and '.join(found)}, so its cache in llama.cpp cannot be edited; "
                "use a model with full attention and rotary positions, or process the shortened text again"
            )

    # -- erasers -------------------------------------------------------------------------------------------------

    def default_eraser(self) -> GgufEraser | NeutralEraser:
        """What contexts erase with when no eraser is given: the one that ships where that is better, else a neutral one."""
        for folder in shipped_erasers().values():
            config = EraserConfig.read(folder / FILE_NAME)
            if self._difference(config) is None:
                return exported_gguf(folder) if config.preferred else self.neutral_eraser()
        return self.neutral_eraser()

    def neutral_eraser(self, repair: int | None = None) -> NeutralEraser:
        """An eraser without training: the span's cells are taken out, and its readers recomputed.

        Args:
            repair: readers of a span to recompute; None: as many as a span of its length deserves (`readers.how_many`).
        """
        if repair is not None and repair < 0:
            raise OptionError(f"repair={repair} must be at least 0 tokens")
        for folder in shipped_erasers().values():
            if (folder / READERS).is_file() and self._difference(EraserConfig.read(folder / FILE_NAME)) is None:
                return NeutralEraser(repair, read_calibration(folder / READERS))
        return NeutralEraser(repair)

    def find_eraser(self, source: str | PathLike[str] | None = None, *, check_weights: bool = True) -> GgufEraser:
        """The eraser to use, as a GGUF file.

        Args:
            source: GGUF adapter or eraser's folder (exported into the cache folder once); None takes the one that ships.
            check_weights: False accepts one whose backbone has the same shape and other weights, such as a coarser
                quantisation than the one it was made for.

        Raises:
            EraserMismatchError: none ships for this model, or it was made for another one.
        """
        if source is None:
            return self._shipped(check_weights)
        place = Path(source)
        found = read_gguf_eraser(place) if place.is_file() else exported_gguf(place)
        difference = self._difference(found.config)
        if difference is not None and (check_weights or "weights" not in difference):
            raise EraserMismatchError(
                f"the eraser in {place} was made for another model than {self.file.name}: {difference}; "
                "use method='full-recompute', or check_weights=False for another quantisation of its backbone"
            )
        return found

    def _shipped(self, check_weights: bool) -> GgufEraser:
        differences = []
        for name, folder in shipped_erasers().items():
            difference = self._difference(EraserConfig.read(folder / FILE_NAME))
            if difference is None or (not check_weights and "weights" in difference):
                return exported_gguf(folder)
            differences.append(f"{name}: {difference}")
        raise EraserMismatchError(
            f"no eraser ships for {self.file.name} ({'; '.join(differences) or 'there is none'}); "
            "use method='full-recompute', or give the GGUF adapter or folder of one"
        )

    def _difference(self, config: EraserConfig) -> str | None:
        model_type = str(config.fingerprint.shape["model_type"])
        return config.fingerprint.difference_to(gguf_fingerprint(self.file, model_type))

    def load_adapter(self, eraser: GgufEraser) -> Any:
        """An eraser's matrices, loaded once; they belong to the model and are freed with it.

        Raises:
            EraserMismatchError: llama.cpp refuses the file.
        """
        key = (str(eraser.file), eraser.source_sha256)
        if key not in self._adapters:
            with captured() as messages:
                adapter = lib.llama_adapter_lora_init(self.handle, str(eraser.file).encode())
            if not adapter:
                raise EraserMismatchError(f"llama.cpp cannot load {eraser.file}: {said(messages)}")
            self._adapters[key] = adapter
        return self._adapters[key]


def _free(handle: Any) -> None:
    with captured():
        lib.llama_model_free(handle)
