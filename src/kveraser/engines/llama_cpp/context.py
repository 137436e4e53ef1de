"""`LlamaCppContext`: a live context of text in llama.cpp, from which spans can be erased.

Knows: text and files, on top of erasing, restoring and running. Does not know how they work.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from kveraser.context.text import find_text, located
from kveraser.engines.llama_cpp.erasing import Erasing
from kveraser.engines.llama_cpp.model import LlamaCppModel
from kveraser.engines.llama_cpp.restoring import Restoring
from kveraser.engines.llama_cpp.running import Running
from kveraser.engines.llama_cpp.session import install, read_session, write_session
from kveraser.engines.llama_cpp.state import LlamaCppReceipt
from kveraser.export import GgufEraser
from kveraser.methods import EraseMethod
from kveraser.spans import Span

__all__ = ["LlamaCppContext", "LlamaCppReceipt"]


class LlamaCppContext(Erasing, Restoring, Running):
    """A context that a model in llama.cpp has read, from which spans can be taken out again. One lock; thread-safe.

    Args:
        model: a loaded GGUF file.
        eraser: for `kveraser`, from `model.find_eraser()`; None takes the one that ships, when it is first needed.
        length: tokens the context can hold; None for 8192, or what the model was trained on where that is less.
        keys, values: types of the cache: f32, f16, q8_0, q5_1, q5_0, q4_1, q4_0.
        flash_attention: None leaves it to llama.cpp; quantised values need it.

    Raises:
        OptionError: an impossible length or type.
        EngineError: llama.cpp cannot make the context.
    """

    def append(self, text: str | Sequence[int] | Tensor) -> Span:
        """Process text (or token ids) at the end of the context; returns its span, valid for ever.

        A beginning-of-text token is put before the first text when the model's tokenizer does so; it is not in the span.

        Raises:
            ContextError: empty text, an id outside the vocabulary, or no room. Nothing was changed.
        """
        if not isinstance(text, str):
            return self.append_ids(text)
        with self._lock:
            plain = self.encode(text)
            ids = self._first(text) if len(self) == 0 else plain
            span = self.append_ids(ids)
            added = len(ids) - len(plain)
            return Span(span.start + added, span.end) if 0 < added < len(span) else span

    def _find(self, text: str) -> Span:
        runs = [(run, self._ids.view[run.slice].tolist()) for run in self._ledger.live()]
        return find_text(self.model.tokenizer, runs, text)

    def _first(self, text: str) -> list[int]:
        ids = self.model.tokenizer.encode(text, add_special_tokens=True)
        while len(ids) > 1 and self.model.tokenizer.ends(ids[-1]):  # some tokenizers also close the text
            ids = ids[:-1]
        return ids

    def erase(
        self, what: Span | str | Iterable[Span | str], method: str | EraseMethod = "kveraser", *, undo: bool = True
    ) -> LlamaCppReceipt:
        """Take spans out of the context.

        Args:
            what: a span (ledger positions, as `append` returned them), a text that occurs once, or several of these.
            method: `kveraser`, `delete-and-shift`, `full-recompute` or `no-erase`, with options as in `kveraser:repair=0`.
            undo: keep what `restore` needs in the receipt.

        Raises:
            SpanError: out of range, empty, reversed, overlapping an erased span, text not found or found twice.
            OptionError: another method, or a window that llama.cpp cannot show.
            EraserMismatchError: no eraser for this model. In every case nothing was changed.
        """
        with self._lock:
            wanted = [what] if isinstance(what, Span | str) else list(what)
            return self.erase_spans([self.locate(entry) for entry in wanted], method, undo=undo)

    def locate(self, what: Span | str) -> Span:
        """The ledger span meant by a span, or by a text that occurs once.

        Raises:
            SpanError: a text that is not in the context, or occurs more than once.
        """
        return located(what, (), self._find)

    @property
    def text(self) -> str:
        """The text that is in the context: appended and not erased."""
        return self.model.tokenizer.decode(self.live_ids)

    def text_of(self, span: Span) -> str:
        """The text of a span, also of an erased one."""
        return self.model.tokenizer.decode(self._ids.view[span.slice].tolist())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""
        return self.model.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of generated ids, without special tokens."""
        return self.model.tokenizer.decode(ids, skip_special_tokens=True)

    def logits(self, text_or_ids: str | Sequence[int] | Tensor) -> Tensor:
        """Logits after each token of a text, float32 `(tokens, vocab)`; the context stays as it is."""
        return self.logits_ids(self.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids)

    def generate(
        self,
        prompt: str | Sequence[int] | Tensor | None = None,
        *,
        max_new_tokens: int = 64,
        keep: bool = False,
        **options: Any,
    ) -> str:
        """Continue the context and return the new text.

        Args:
            prompt: text or ids to put behind the context first; None continues as it is (the last token runs again).
            max_new_tokens: at most so many.
            keep: append prompt and answer to the context; otherwise it stays as it is.
            options: see `generate_ids`.

        Raises:
            ContextError: an emptied context without a prompt, or no room.
        """
        with self._lock:
            if isinstance(prompt, str):
                prompt = self._first(prompt) if len(self) == 0 else self.encode(prompt)
            ids = [] if prompt is None else prompt
            return self.decode(self.generate_ids(ids, max_new_tokens=max_new_tokens, keep=keep, **options))

    # -- files ---------------------------------------------------------------------------------------------------

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the context to a folder, whole or not at all; an older one there is replaced.

        What `restore` would need bit-exactly is not saved: a loaded context restores by recomputing.

        Raises:
            SessionFileError: the path is a file.
        """
        with self._lock:
            return write_session(self, Path(folder))

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: LlamaCppModel,
        eraser: GgufEraser | None = None,
        *,
        length: int | None = None,
    ) -> LlamaCppContext:
        """Read a saved context; its cache has the types it was saved with.

        Raises:
            SessionFileError: missing, truncated, altered, of a newer format, or of another model.
        """
        saved = read_session(Path(folder), model)
        context = cls(model, eraser, length=length or saved.length, **saved.settings)
        install(context, saved)
        return context
