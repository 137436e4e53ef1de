"""Running ahead of a context: logits and generation, which leave it as it was; and token by token, which does not.

Knows: `model.generate`. Does not know about erasing.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from kveraser.cache import (
    PREFILL_CHUNK,
    append,
    cache_length,
    snapshot,
    truncate,
)
from kveraser.context.state import ContextState
from kveraser.errors import ContextError
from kveraser.interrupts import uninterrupted
from kveraser.model.attention import for_decoding
from kveraser.model.view import model_device
from kveraser.spans import Span


class Running(ContextState):
    """`logits_ids`, `generate_ids` and `advance`."""

    @torch.no_grad()
    def logits_ids(self, ids: Sequence[int] | Tensor, *, from_last: bool = False) -> Tensor:
        """Logits after each of the given tokens, float32 `(tokens, vocab)`; the context stays as it is.

        Args:
            from_last: run the context's last token again first, and give the logits after it as well, as row 0.

        Raises:
            ContextError: no token at all, or an id outside the vocabulary.
        """
        with self._lock:
            new = self._checked_ids(ids).to(model_device(self.model))
            if from_last and len(self._slots) == 0:
                raise ContextError("the context is empty, so it has no last token")
            if len(new) == 0 and not from_last:
                raise ContextError("nothing to look at: the text has no tokens")
            rows = []
            with self._scratch(from_last) as cache:
                length = cache_length(cache)
                new = torch.cat([self._slots.view[length:], new])
                for a in range(0, len(new), PREFILL_CHUNK):
                    part = new[a : a + PREFILL_CHUNK]
                    where = torch.arange(length + a, length + a + len(part), device=new.device)[None]
                    with self._reading(for_decoding(self.model)) as model:
                        output = model(input_ids=part[None], position_ids=where, past_key_values=cache, use_cache=True)
                    rows.append(output.logits[0].float())
            return torch.cat(rows)

    @torch.no_grad()
    def advance(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Append tokens; returns the logits after the last of them, float32 `(vocab,)`.

        Raises:
            ContextError: no token, or an id outside the vocabulary.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0:
                raise ContextError("nothing to append: there are no tokens")
            if len(new) > 1:
                self._extend(new[:-1])
                self._register(new[:-1])
            length = cache_length(self.cache)
            device = model_device(self.model)
            try:
                with self._reading(for_decoding(self.model)) as model:
                    output = model(
                        input_ids=new[-1:].to(device)[None],
                        position_ids=torch.tensor([[length]], device=device),
                        past_key_values=self.cache,
                        use_cache=True,
                    )
            except BaseException:
                with uninterrupted():
                    for layer in self.cache.layers:  # the interrupted pass may have reached only some of them
                        layer.crop(min(length - int(layer.get_seq_length()), 0))
                raise
            self._register(new[-1:])
            logits: Tensor = output.logits[0, -1].float()
            return logits

    @contextmanager
    def _scratch(self, drop_last: bool) -> Iterator[DynamicCache]:
        """The cache to be run ahead (without its last slot, if wanted); as it was, bit for bit, when the block ends."""
        length = cache_length(self.cache)
        last = snapshot(self.cache, Span(length - 1, length)) if drop_last else None
        try:
            truncate(self.cache, length - drop_last)
            yield self.cache
        finally:
            with uninterrupted():
                for layer in self.cache.layers:  # an interrupted pass may have reached only some of them
                    layer.crop(min(length - drop_last - int(layer.get_seq_length()), 0))
                if last is not None:
                    append(self.cache, last)

    @torch.no_grad()
    def generate_ids(
        self, ids: Sequence[int] | Tensor = (), *, max_new_tokens: int = 64, keep: bool = False, **options: Any
    ) -> list[int]:
        """Continue the context, after `ids` when given, with `model.generate`; returns the new ids.

        Without new ids the last token is run again. Erased ids reach neither the model nor a logits processor.

        Args:
            max_new_tokens: at most so many.
            keep: append `ids` and the answer to the context; otherwise it stays as it is, bit for bit.
            options: for `model.generate` (do_sample, temperature, num_beams, ...).

        Raises:
            ContextError: an emptied context without new ids.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0 and len(self._slots) == 0:
                raise ContextError("the context is empty; give some text to continue")
            prompt = torch.cat([self._slots.view, new.to(model_device(self.model))])[None]
            beams = int(options.get("num_beams") or 1)
            rows = max(beams, int(options.get("num_return_sequences") or 1))
            settings = {"do_sample": False, "pad_token_id": self._pad_id(), **options}
            with self._scratch(len(new) == 0) as cache:
                if rows > 1:
                    cache = copy.deepcopy(cache)
                    cache.batch_repeat_interleave(rows)
                with self._reading(for_decoding(self.model)) as model:
                    output = model.generate(
                        input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache,
                        max_new_tokens=max_new_tokens, **settings,
                    )  # fmt: skip
                answer = torch.as_tensor(output[0, prompt.shape[1] :]).cpu()
                run = len(new) + len(answer) - 1  # the last new token has not been run yet
                kept = None
                if keep and rows == 1 and len(new) and cache_length(cache) == prompt.shape[1] + len(answer) - 1:
                    kept = snapshot(cache, Span(prompt.shape[1] - len(new), prompt.shape[1] - len(new) + run))
            if keep:
                added = torch.cat([new, answer])
                if kept is not None:
                    with uninterrupted():
                        append(self.cache, kept)
                        self._register(added[:run])
                    added = added[run:]
                self.append_ids(added)
            return answer.tolist()

    def _pad_id(self) -> int:
        settings = self.model.generation_config
        for value in (settings.pad_token_id, settings.eos_token_id):
            if value is not None:
                return int(value[0] if isinstance(value, list) else value)
        return 0
