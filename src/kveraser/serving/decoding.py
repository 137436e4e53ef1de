"""From logits to text: sampling, stop strings, log-probabilities, token by token.

Knows: contexts of ids, tokenizers. Does not know about HTTP or where a context comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TopPLogitsWarper

from kveraser.context import TokenContext


@dataclass(frozen=True)
class Sampling:
    """How to continue.

    Attributes:
        max_tokens: at most so many.
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that has this probability.
        seed: the same seed gives the same reply; None draws one.
        stop: the reply ends before the first of these texts.
        logprobs: how many of the most likely tokens to report beside each token; None reports nothing.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: also where the temperature is too small to divide by."""
        return self.temperature < 1e-4


@dataclass(frozen=True)
class TokenLogprob:
    """A token, its natural log-probability before temperature and top-p, and the most likely ones in its place."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What one more step adds to a reply: text that is certain by now, and the tokens sampled since the last one."""

    text: str
    tokens: tuple[TokenLogprob, ...] = ()
    sampled: int = 0
    finish_reason: str | None = None


def end_ids(model: PreTrainedModel) -> set[int]:
    """The tokens that end a reply."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


def decode(
    context: TokenContext,
    logits: Tensor,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: set[int],
    check: Callable[[], None],
) -> Iterator[Delta]:
    """Continue a context whose last token gave `logits`; every sampled token but the last is appended to it.

    The last delta has the finish reason: `stop` (an end token or a stop text) or `length`.

    Args:
        check: called before every token; what it raises ends the reply.
    """
    generator = torch.Generator(logits.device)
    generator.manual_seed(sampling.seed) if sampling.seed is not None else generator.seed()
    text = _StoppingText(tokenizer, sampling.stop)
    count = 0
    while True:
        check()
        token = _sample(logits, sampling, generator)
        count += 1
        logprob = () if sampling.logprobs is None else (_logprob(logits, token, sampling.logprobs),)
        new = "" if token in end_ids else text.push(token)
        if token in end_ids or text.stopped:
            yield Delta(new + text.finish(), logprob, 1, "stop")
            return
        if count >= sampling.max_tokens:
            yield Delta(new + text.finish(), logprob, 1, "stop" if text.stopped else "length")
            return
        yield Delta(new, logprob, 1)
        logits = context.advance([token])


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.greedy:
        return int(logits.argmax())
    scores = logits / sampling.temperature
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(torch.empty(1, 0, dtype=torch.long), scores[None])[0]
    return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))


def _logprob(logits: Tensor, token: int, count: int) -> TokenLogprob:
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs))) if count else (logprobs[:0], logprobs[:0].long())
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


class _StoppingText:
    """Text of tokens as it becomes certain: whole characters only, and nothing that may belong to a stop text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._decoded = self._pending = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; returns what is certain now."""
        self._ids.append(token)
        return self._add(self._stream.step(self._tokenizer.backend_tokenizer, token) or "")

    def finish(self) -> str:
        """What was held back; characters that were never completed as replacement characters."""
        if self.stopped:
            return ""
        whole = str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        new = self._add(whole[len(self._decoded) :])
        rest, self._pending = self._pending, ""
        return new if self.stopped else new + rest

    def _add(self, new: str) -> str:
        self._decoded += new
        self._pending += new
        found = [at for stop in self._stop if (at := self._pending.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._pending[: min(found)]
        held = max((_overlap(self._pending, stop) for stop in self._stop), default=0)
        certain = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(certain) :]
        return certain


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
