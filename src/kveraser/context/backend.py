"""What a live context asks of a backend besides editing: running ahead, an exact copy beside, erasers, its part of a session file.

Knows: the backend interface, ids. Does not know about ledgers, text, or any engine.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kveraser.cache import Backend, Eraser, Tokens
from kveraser.context.decoding import GREEDY, Drawing, Step, Watch, steps
from kveraser.errors import ContextError, OptionError
from kveraser.interrupts import uninterrupted

Keep = Callable[[list[int], int], None]
"""Called with the answer and how many tokens, from the first new one on, have their slots at the end of the cache now."""

Run = Callable[[list[int], bool], Tensor]
"""Runs tokens; gives the logits after every one of them, or after the last only, float32 `(rows, vocab)`."""


class LiveBackend(Backend):
    """A backend of one row without padding, with the model that fills it."""

    stored_as: ClassVar[tuple[str, str]] = ("states", ".safetensors")
    """What its states are called in a session's index and file names, and how these end."""
    device: torch.device = torch.device("cpu")
    """Where ids are needed, and where logits are."""
    capacity: int | None = None
    """How many slots there can be; None: any number."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many token ids there are."""

    def check_room(self, count: int) -> None:
        """Raise `ContextError` unless so many more tokens fit."""
        if self.capacity is not None and self.length + count > self.capacity:
            raise ContextError(
                f"{count} more tokens do not fit: {self.length} of {self.capacity} slots are in use; make the context with "
                "a larger length"
            )

    @abstractmethod
    def find_eraser(self, given: Any) -> Eraser:
        """The eraser to use: the one that the context was given, or with None the model's own.

        Raises:
            EraserMismatchError: it was made for another model, or there is none.
        """

    def ends(self, token: int) -> bool:
        """Whether a token ends a text or a turn."""
        return False

    # -- running ahead -------------------------------------------------------------------------------------------

    @abstractmethod
    def ahead(self, drop_last: bool) -> AbstractContextManager[Run]:
        """What runs tokens behind the slots (without the last, if wanted), more with every call.

        The cache is as it was when the block ends, bit for bit and whatever happens, unless `keep_ahead` was called in it.
        """

    @abstractmethod
    def keep_ahead(self, count: int) -> None:
        """Let so many tokens, which were run in the `ahead` block (with no slot dropped), stay behind the slots."""

    def advance(self, tokens: Tokens) -> Tensor:
        """As `extend`, by the last token alone; returns the logits after it, float32 `(vocab,)`."""
        with self.ahead(False) as run:
            logits = run(tokens.ids[0, -1:].tolist(), False)[-1]
            with uninterrupted():
                self.keep_ahead(1)
        return logits

    def logits(self, slots: Tensor, new: Tensor, *, from_last: bool) -> Tensor:
        """Logits after each new token, float32 `(tokens, vocab)`; the cache stays as it is.

        Args:
            slots: `(slots,)`, the ids that go with the cache.
            new: `(tokens,)`.
            from_last: run the last slot's token again first, and give the logits after it as row 0.
        """
        self.check_room(len(new) + from_last)
        with self.ahead(from_last) as run:
            return run([*slots[len(slots) - from_last :].tolist(), *new.tolist()], True)

    def reply(
        self,
        slots: Tensor,
        new: Tensor,
        *,
        max_new_tokens: int,
        keep: Keep | None,
        min_new_tokens: int = 0,
        drawing: Drawing = GREEDY,
        watch: Watch | None = None,
    ) -> list[int]:
        """Continue token by token after the new ones, or without any after the last slot's token, which runs again; the new ids.

        Args:
            slots, new: as of `logits`.
            keep: None leaves the cache as it is; else states that were computed on the way may be kept, and it is told how many.
            watch: called with every step; may end the answer.

        Raises:
            OptionError: an impossible number of tokens.
            ContextError: no room.
        """
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens={max_new_tokens} must be at least 1")
        given, again = new.tolist(), len(new) == 0
        self.check_room(len(given) + again + max_new_tokens)
        with self.ahead(again) as run:
            logits = run(given or slots[-1:].tolist(), False)[-1]
            answer: list[int] = []
            for step in steps(
                logits, lambda token: run([token], False)[-1], self.ends, drawing, min_tokens=min_new_tokens
            ):
                answer = step.answer
                stop = watch is not None and watch(step)
                if stop or step.ended or len(answer) >= max_new_tokens:
                    break
            if keep and given:
                count = len(given) + len(answer) - 1
                with uninterrupted():
                    self.keep_ahead(count)
                    keep(answer, count)
        return answer

    def generate(
        self, slots: Tensor, new: Tensor, *, max_new_tokens: int, keep: Keep | None, **options: Any
    ) -> list[int]:
        """As `reply`, with the options of the engine.

        Args:
            options: here `min_new_tokens`, those of `Drawing`, and `stopping_criteria`: called with the ids seen and new
                `(1, tokens)` and the logits `(1, vocab)`, as transformers does; the answer ends when one says so.
        """
        criteria, shortest = options.pop("stopping_criteria", ()), options.pop("min_new_tokens", 0)
        seen = new.tolist() or slots[-1:].tolist()

        def stops(step: Step) -> bool:
            ids = torch.tensor([[*seen, *step.answer]])
            return any(bool(torch.as_tensor(stop(ids, step.logits[None])).all()) for stop in criteria)

        return self.reply(
            slots, new, max_new_tokens=max_new_tokens, min_new_tokens=shortest, drawing=Drawing(**options), keep=keep,
            watch=stops if criteria else None,
        )  # fmt: skip

    # -- other caches --------------------------------------------------------------------------------------------

    @abstractmethod
    def fresh(self) -> Self:
        """An empty one of the same kind."""

    @abstractmethod
    def take_over(self, other: Self, *, wipe: bool = False) -> None:
        """Exchange contents with another one; nothing is copied. `wipe` overwrites what was here."""

    def wipe_spare(self) -> None:
        """Overwrite memory that is not in use: it may hold states of tokens that were dropped."""

    # -- files ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def pack(self, ids: Tensor) -> tuple[dict[str, Any], bytes]:
        """What a session file has to say of the cache (JSON) and the states in bytes; the ids of the ledger in either of them."""

    @abstractmethod
    def unpack(self, index: dict[str, Any], data: bytes) -> Tensor:
        """Fill an empty cache with what `pack` gave; returns the ids.

        Raises:
            SessionFileError: of another model.
        """
