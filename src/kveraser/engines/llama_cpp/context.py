"""`LlamaCppContext`: a live context in llama.cpp, from which spans can be erased.

Knows: how its backend is made and its sessions are read, on top of `LiveContext`, which has all the verbs. Does not know how they work.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from kveraser.context import LiveContext
from kveraser.context.session_folder import read_session
from kveraser.engines.llama_cpp.backend import LlamaCppBackend, check_saved
from kveraser.engines.llama_cpp.model import LlamaCppModel, NeutralEraser
from kveraser.export import GgufEraser
from kveraser.methods import methods

METHODS = tuple(kind for kind in methods().values() if kind.needs <= LlamaCppBackend.can)
"""What can be done to llama.cpp's cells."""


class LlamaCppContext(LiveContext):
    """A context that a model in llama.cpp has read, from which spans can be taken out again. One lock; thread-safe.

    `generate` takes `min_new_tokens`, `temperature`, `top_p`, `seed` and `stopping_criteria` as options.

    Args:
        model: a loaded GGUF file.
        eraser: for `kveraser`, from `model.find_eraser()` or `model.neutral_eraser()`; None takes `model.default_eraser()`, when it
            is first needed.
        length: tokens the context can hold; None for 8192, or what the model was trained on where that is less.
        keys, values: types of the cache: f32, f16, q8_0, q5_1, q5_0, q4_1, q4_0.
        flash_attention: None leaves it to llama.cpp; quantised values need it.

    Raises:
        OptionError: an impossible length or type.
        EngineError: llama.cpp cannot make the context.
    """

    backend: LlamaCppBackend

    def __init__(
        self,
        model: LlamaCppModel,
        eraser: GgufEraser | NeutralEraser | None = None,
        *,
        length: int | None = None,
        keys: str = "f16",
        values: str = "f16",
        flash_attention: bool | None = None,
    ) -> None:
        super().__init__(LlamaCppBackend(model, length, keys, values, flash_attention), model.tokenizer, eraser)
        self.model = model

    @property
    def room(self) -> int:
        """How many more tokens fit."""
        return self.backend.capacity - self.backend.length

    def close(self) -> None:
        """Free the cells now, not when the object is collected; it cannot be used afterwards."""
        self.backend.close()

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: LlamaCppModel,
        eraser: GgufEraser | NeutralEraser | None = None,
        *,
        length: int | None = None,
    ) -> LlamaCppContext:
        """Read a saved context; its cache has the types it was saved with.

        Raises:
            SessionFileError: missing, truncated, altered, of a newer format, or of another model.
        """
        session, version = read_session(Path(folder), LlamaCppBackend.stored_as)
        check_saved(session.index, model)
        context = cls(model, eraser, length=length or int(session.index["length"]), **session.index["settings"])
        context._install(session, version, folder)
        return context
