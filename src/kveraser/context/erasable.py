"""`ErasableContext`: a live context of a transformers model.

Knows: models, their caches, tokenizers, on top of `LiveContext`. Does not know how erasing works.
"""

from __future__ import annotations

from os import PathLike

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from kveraser.context.live import LiveContext
from kveraser.context.transformers import LiveTransformers
from kveraser.eraser import KVEraser
from kveraser.errors import ContextError
from kveraser.spans import Span


class ErasableContext(LiveContext):
    """A context that a model has read, from which spans can be taken out again.

    Args:
        model: a causal language model; it is used and left as it is.
        tokenizer: its tokenizer; None for a context of token ids only.
        eraser: for `kveraser` and `auto`; None takes the one that ships for the model, if any.

    Raises:
        UnsupportedCacheError: a model whose cache cannot be edited.
        EraserMismatchError: an eraser of another model.
    """

    backend: LiveTransformers

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, eraser: KVEraser | None = None
    ) -> None:
        super().__init__(LiveTransformers(model), tokenizer, eraser)
        self.model = model

    @property
    def cache(self) -> DynamicCache:
        """The keys and values of its slots."""
        return self.backend.cache

    def prefix(self, length: int, *, take: bool = False, wipe: bool = False) -> ErasableContext:
        """A new context of the first `length` live tokens, without messages, and with nothing erased in its ledger.

        Args:
            take: hand the states over instead of copying them; this context is empty afterwards.
            wipe: with `take`, overwrite all other states.

        Raises:
            ContextError: more tokens than are exact.
        """
        with self._lock:
            known = self.backend.marks.approximate_from
            exact = self.backend.length if known is None else known
            if not 0 <= length <= exact:
                raise ContextError(f"the first {exact} tokens are exact, and {length} were wanted; call repair() first")
            ids = torch.tensor(self.live_ids[:length], dtype=torch.long)
            new = ErasableContext(self.model, self.tokenizer, self.eraser)
            if length and take:
                new.backend.take_over(self.backend)
                new.backend.crop(length)
            elif length:
                new.backend.put(Span(0, length), self.backend.take(Span(0, length)))
            if length:
                new._register(ids)
            if take:
                if wipe:
                    for left in (self.backend, *([self._repair.beside] if self._repair else [])):
                        left.crop(0)
                        left.wipe_spare()
                    new.backend.wipe_spare()
                self.backend = self.backend.fresh()
                self._begin()
            return new

    @classmethod
    def load(
        cls,
        folder: str | PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eraser: KVEraser | None = None,
    ) -> ErasableContext:
        """Read a saved context.

        Raises:
            SessionFileError: missing, truncated, altered, of a newer format, or of another model.
        """
        context = cls(model, tokenizer, eraser)
        context._read(folder)
        return context
