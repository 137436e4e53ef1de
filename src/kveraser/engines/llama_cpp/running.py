"""Running ahead of a llama.cpp context: logits and generation.

Knows: sampling. Does not know about erasing or text.

Both run on the work sequence, which shares the live cells: the context itself is not touched, whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kveraser.engines.llama_cpp.cells import LIVE, WORK
from kveraser.engines.llama_cpp.state import LlamaCppState
from kveraser.errors import ContextError, OptionError
from kveraser.interrupts import uninterrupted
from kveraser.spans import Span


class Running(LlamaCppState):
    """`logits_ids` and `generate_ids`."""

    def logits_ids(self, ids: Sequence[int] | Tensor, *, from_last: bool = False) -> Tensor:
        """Logits after each of the given tokens, float32 `(tokens, vocab)`; the context stays as it is.

        Args:
            from_last: run the context's last token again first, and give the logits after it as well, as row 0.

        Raises:
            ContextError: no token at all, an id outside the vocabulary, or no room.
        """
        with self._lock:
            new = self._checked_ids(ids)
            if not new and not from_last:
                raise ContextError("nothing to look at: the text has no tokens")
            with self._ahead(from_last, len(new)) as (start, last):
                return torch.from_numpy(self._cells.run([*last, *new], start, WORK, "all"))

    @contextmanager
    def _ahead(self, from_last: bool, count: int) -> Iterator[tuple[int, list[int]]]:
        """Let the work sequence share the live cells (without the last, if wanted); where it ends, and the last id."""
        length = self._slots
        if from_last and length == 0:
            raise ContextError("the context is empty, so it has no last token")
        self._check_room(count + from_last)
        last = self._ids_of_slots(Span(length - 1, length)) if from_last else []
        start = length - len(last)
        self._cells.remove(WORK)
        try:
            if start:
                self._cells.share(LIVE, WORK, Span(0, start))
            yield start, last
        finally:
            with uninterrupted():
                self._cells.remove(WORK)

    def generate_ids(
        self,
        ids: Sequence[int] | Tensor = (),
        *,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        keep: bool = False,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stopping_criteria: Sequence[Callable[[Tensor, Tensor], Any]] = (),
    ) -> list[int]:
        """Continue the context, after `ids` when given; returns the new ids.

        Without new ids the last token is run again. Erased ids never reach the model.

        Args:
            max_new_tokens, min_new_tokens: at most and at least so many.
            keep: append `ids` and the answer to the context; otherwise it stays as it is, bit for bit.
            temperature: 0 takes the most likely token.
            top_p: sample from the smallest set of tokens that has this probability.
            seed: the same seed gives the same answer; None draws one.
            stopping_criteria: called with all new ids `(1, tokens)` and the logits `(1, vocab)`, as transformers does; the
                answer ends when one says so.

        Raises:
            ContextError: an emptied context without new ids, or no room.
            OptionError: an impossible option.
        """
        if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
            raise OptionError(
                f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} at least 0, "
                f"top_p={top_p} above 0 and at most 1"
            )
        with self._lock:
            new = self._checked_ids(ids)
            generator = torch.Generator()
            generator.manual_seed(seed) if seed is not None else generator.seed()
            answer: list[int] = []
            with self._ahead(not new, len(new) + max_new_tokens) as (at, last):
                run = [*last, *new]
                while True:
                    logits = torch.from_numpy(self._cells.run(run, at, WORK, "last"))
                    at += len(run)
                    if len(answer) < min_new_tokens:
                        logits[:, self._end_ids()] = -torch.inf
                    token = _sample(logits[0], temperature, top_p, generator)
                    answer.append(token)
                    seen = torch.tensor([[*(new or last), *answer]])
                    done = self.model.tokenizer.ends(token) or len(answer) >= max_new_tokens
                    if done or any(bool(torch.as_tensor(stop(seen, logits)).all()) for stop in stopping_criteria):
                        break
                    run = [token]
                start = self._slots
                if keep and new and at > start:
                    with uninterrupted():
                        self._cells.share(WORK, LIVE, Span(start, at))
                        self._register([*new, *answer][: at - start])
            if keep:
                self.append_ids([*new, *answer][at - start if new else 0 :])
            return answer

    def _end_ids(self) -> list[int]:
        if self._ends is None:
            self._ends = [token for token in range(self.model.vocabulary) if self.model.tokenizer.ends(token)]
        return self._ends

    _ends: list[int] | None = None


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature < 1e-4:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
