"""From the steps of the decoder to a reply: text as it becomes certain, stop texts, log-probabilities.

Knows: the decoder, tokenizers. Does not know about HTTP, or where logits come from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kveraser.context import Decoder, Drawing

_CHANGED = "Invalid prefix encountered"  # tokenizers: the text so far is no longer how it begins


@dataclass(frozen=True, kw_only=True)
class Sampling(Drawing):
    """How to continue.

    Attributes:
        max_tokens: at most so many.
        stop: the reply ends before the first of these texts.
        logprobs: how many of the most likely tokens to report beside each token; None reports nothing.
    """

    max_tokens: int
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability before temperature and top-p, and the most likely ones in its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What one more step adds to a reply: text that is certain by now, and the tokens sampled since the last one.

    Attributes:
        finish_reason: of the last one.
        stopped_by: the stop text that ended the reply, if one did.
    """

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    sampled: int = 0
    finish_reason: str | None = None
    stopped_by: str | None = None


class Decoding:
    """A reply in the making: what each token adds to it, as soon as the logits that it is drawn from are there.

    The last delta has the finish reason: `stop` (an end token or a stop text) or `length`.

    Args:
        ends: whether a token ends a text or a turn.
        device: where the logits are.
    """

    def __init__(
        self,
        sampling: Sampling,
        tokenizer: PreTrainedTokenizerBase,
        ends: Callable[[int], bool],
        device: torch.device,
    ) -> None:
        self._sampling, self._decoder = sampling, Decoder(ends, sampling, device)
        self._text = GrowingText(tokenizer, sampling.stop)
        self._count = 0
        self.token = -1
        """The last token that was drawn; it is to be run before the next one is."""

    def draw(self, logits: Tensor) -> Delta:
        """The next token, from the logits after the last one, float32 `(vocab,)`."""
        step, wanted = self._decoder.draw(logits), self._sampling.logprobs
        self.token, self._count = step.token, self._count + 1
        logprob = () if wanted is None else (_logprob(step.logits, step.token, wanted),)
        new = "" if step.ended else self._text.push(step.token)
        done = step.ended or self._text.stopped
        if done or self._count >= self._sampling.max_tokens:
            new += self._text.finish()
            reason = "stop" if done or self._text.stopped else "length"
            return Delta(new, logprob, 1, reason, self._text.stopped_by)
        return Delta(new, logprob, 1)


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs))) if count else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


class GrowingText:
    """Text of tokens as it becomes certain: whole characters only, and nothing that may belong to a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._told = 0  # ids whose text was certain, at least in part
        self._decoded = self._pending = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop text has come."""
        return self.stopped_by is not None

    def push(self, token: int) -> str:
        """Add a token; returns what is certain now."""
        self._ids.append(token)
        return self._add(self._step(token))

    def finish(self) -> str:
        """What was held back; characters that were never completed as replacement characters."""
        if self.stopped:
            return ""
        whole = self._decode(self._ids)
        is_kept = whole.startswith(self._decoded)
        new = self._add(whole[len(self._decoded) :] if is_kept else self._decode(self._ids[self._told :]))
        rest, self._pending = self._pending, ""
        return new if self.stopped else new + rest

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _step(self, token: int) -> str:
        """What is certain by one more token.

        A tokenizer that writes rare characters in bytes shows a whole run of these as broken when one is, also characters that were told
        before. They have been told; the text goes on with what has not, as if it began there.
        """
        try:
            new = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
        except Exception as error:
            if _CHANGED not in str(error):
                raise
            self._ids, self._decoded = self._ids[self._told :], ""
            self._stream = DecodeStream(skip_special_tokens=True)
            new = "".join(self._stream.step(self._tokenizer.backend_tokenizer, each) or "" for each in self._ids)
        if new:
            self._told = len(self._ids)
        return new

    def _add(self, new: str) -> str:
        self._decoded += new
        self._pending += new
        found = [(at, stop) for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found, key=lambda entry: entry[0])
            return self._pending[:at]
        held = max((overlap(self._pending, stop) for stop in self._stop), default=0)
        certain = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(certain) :]
        return certain


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
