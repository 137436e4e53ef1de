"""What looks on while `model.generate` runs: stops it, passes its text on, keeps its logits.

Knows: hooks of transformers' generation. Does not know about sessions or HTTP.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

from kveraser.serving.worker import Job


class Watch(StoppingCriteria):
    """Stops a generation when nobody waits any more; notes when it began and how long the prompt was."""

    def __init__(self, job: Job) -> None:
        self.job, self.prompt_length, self.first = job, 0, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        if not self.prompt_length:
            self.prompt_length, self.first = input_ids.shape[1] - 1, time.perf_counter()
        self.job.check()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class FirstLine(StoppingCriteria):
    """Ends an answer with its first line that is not blank."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self._start = tokenizer, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        self._start = self._start or input_ids.shape[1] - 1
        text = str(self.tokenizer.decode(input_ids[0, self._start :].tolist(), skip_special_tokens=True))
        return torch.full((input_ids.shape[0],), "\n" in text.lstrip(), device=input_ids.device)


class Rows(LogitsProcessor):
    """Keeps the logits of the first tokens of an answer as they are.

    Attributes:
        rows: float32 `(vocab,)` each, at most `limit` of them.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.rows = limit, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if len(self.rows) < self.limit:
            self.rows.append(scores[0].float().cpu().clone())
        return scores


class NotEmpty(LogitsProcessor):
    """Keeps an answer from ending before it has begun: its first token is none of the end tokens."""

    def __init__(self, end_ids: Set[int]) -> None:
        self.end_ids, self._begun = sorted(end_ids), False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        if not self._begun and self.end_ids:
            scores = scores.clone()
            scores[:, self.end_ids] = -torch.inf
        self._begun = True
        return scores


class Emitter(TextStreamer):
    """Passes text on as it becomes certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)
