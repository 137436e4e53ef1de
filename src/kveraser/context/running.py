"""Running ahead of a context: logits and answers, which leave it as it was unless they are to be kept; and token by token.

Knows: the ledger, what a backend runs ahead. Does not know how it does that, or about erasing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kveraser.context.decoding import GREEDY, Drawing, Watch
from kveraser.context.state import ContextState
from kveraser.errors import ContextError


class Running(ContextState):
    """`logits_ids`, `reply_ids`, `generate_ids` and `advance`."""

    @torch.no_grad()
    def logits_ids(self, ids: Sequence[int] | Tensor, *, from_last: bool = False) -> Tensor:
        """Logits after each of the given tokens, float32 `(tokens, vocab)`; the context stays as it is.

        Args:
            from_last: run the context's last token again first, and give the logits after it as well, as row 0.

        Raises:
            ContextError: no token at all, an id outside the vocabulary, or no room.
        """
        with self._lock:
            new = self._checked_ids(ids).to(self.device)
            if from_last and len(self._slots) == 0:
                raise ContextError("the context is empty, so it has no last token")
            if len(new) == 0 and not from_last:
                raise ContextError("nothing to look at: the text has no tokens")
            return self.backend.logits(self._slots.view, new, from_last=from_last)

    @torch.no_grad()
    def advance(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Append tokens; returns the logits after the last of them, float32 `(vocab,)`.

        Raises:
            ContextError: no token, an id outside the vocabulary, or no room.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0:
                raise ContextError("nothing to append: there are no tokens")
            self.backend.check_room(len(new))
            with self._growing():
                if len(new) > 1:
                    self._extend(new[:-1])
                    self._register(new[:-1])
                logits = self.backend.advance(self._tokens(new[-1:]))
                self._register(new[-1:])
                return logits

    @torch.no_grad()
    def reply_ids(
        self,
        ids: Sequence[int] | Tensor = (),
        drawing: Drawing = GREEDY,
        *,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        keep: bool = False,
        watch: Watch | None = None,
    ) -> list[int]:
        """Continue the context, after `ids` when given, by the one decoder that all engines share; returns the new ids.

        As `generate_ids`, but for what the engine adds: nothing but `drawing` has a say in the choice of a token.

        Args:
            max_new_tokens, min_new_tokens: at most and at least so many.
            watch: called with every step; True ends the answer there, and what it raises leaves the context as it was.

        Raises:
            ContextError: an emptied context without new ids, or no room.
            OptionError: an impossible number of tokens.
        """
        return self._continued(
            ids, keep, partial(self.backend.reply, max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens,
                               drawing=drawing, watch=watch),
        )  # fmt: skip

    @torch.no_grad()
    def generate_ids(
        self, ids: Sequence[int] | Tensor = (), *, max_new_tokens: int = 64, keep: bool = False, **options: Any
    ) -> list[int]:
        """Continue the context, after `ids` when given; returns the new ids.

        Without new ids the last token is run again. Erased ids reach neither the model nor a logits processor.

        Args:
            max_new_tokens: at most so many.
            keep: append `ids` and the answer to the context; otherwise it stays as it is, bit for bit.
            options: of the engine; in transformers those of `model.generate` (do_sample, temperature, num_beams, ...).

        Raises:
            ContextError: an emptied context without new ids, or no room.
        """
        return self._continued(ids, keep, partial(self.backend.generate, max_new_tokens=max_new_tokens, **options))

    def _continued(self, ids: Sequence[int] | Tensor, keep: bool, run: Callable[..., list[int]]) -> list[int]:
        with self._lock:
            new = self._checked_ids(ids)
            if len(new) == 0 and len(self._slots) == 0:
                raise ContextError("the context is empty; give some text to continue")
            kept = 0

            def enter(answer: list[int], count: int) -> None:
                nonlocal kept
                kept = count
                self._register(torch.cat([new, torch.tensor(answer, dtype=torch.long)])[:count])

            with self._growing():
                answer = run(self._slots.view, new.to(self.device), keep=enter if keep else None)
                if keep:
                    self.append_ids([*new.tolist(), *answer][kept:])
                return answer
