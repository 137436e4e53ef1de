"""What looks on while a session is answered: stops it, passes its text on, keeps the logits.

Knows: steps of the decoder, jobs. Does not know about sessions or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kveraser.context import Step, says_a_line
from kveraser.serving.decoding import GrowingText
from kveraser.serving.worker import Job


class Watcher:
    """Is called with every step of one answer.

    Args:
        job: whose answer it is; it ends when nobody waits any more.
        tokenizer: for the text.
        emit: called with the text as it becomes certain; None where it is not wanted piece by piece.
        first_line: end with the first line that is not blank.
        keep: of so many first tokens the logits are kept.

    Attributes:
        first: when the first token was there (`time.perf_counter`).
        rows: float32 `(vocab,)` each, what the first tokens were drawn from.
    """

    def __init__(
        self,
        job: Job,
        tokenizer: PreTrainedTokenizerBase,
        emit: Callable[[str], None] | None = None,
        *,
        first_line: bool = False,
        keep: int = 0,
    ) -> None:
        self.job, self.emit, self.first_line, self.keep = job, emit, first_line, keep
        self.tokenizer, self._text = tokenizer, GrowingText(tokenizer)
        self.first, self.rows = 0.0, list[Tensor]()

    def __call__(self, step: Step) -> bool:
        self.first = self.first or time.perf_counter()
        if len(self.rows) < self.keep:
            self.rows.append(step.logits.cpu().clone())
        if not step.ended:
            self._emit(self._text.push(step.token))
        self.job.check()
        return self.first_line and says_a_line(str(self.tokenizer.decode(step.answer, skip_special_tokens=True)))

    def finish(self) -> None:
        """Pass on what was not certain until the answer was whole."""
        self._emit(self._text.finish())

    def _emit(self, text: str) -> None:
        if text and self.emit is not None:
            self.emit(text)
