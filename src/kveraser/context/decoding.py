"""The one decoder: from logits to the next token, and on.

Knows: logits, sampling. Does not know how tokens are run, what a context is, or about text.

Contexts of every engine reply with it, the server and the comparisons answer with it. What an engine brings of its own (`model.generate` of
transformers, a vLLM server) is reached by `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from kveraser.errors import OptionError


@dataclass(frozen=True)
class Drawing:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: draw from the smallest set of tokens that has this probability.
        top_k: draw from so many of the most likely tokens; 0 draws from all.
        seed: the same seed gives the same tokens; None draws one.

    Raises:
        OptionError: a negative temperature or `top_k`, or `top_p` not in (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise OptionError(
                f"temperature={self.temperature} and top_k={self.top_k} must be at least 0, "
                f"top_p={self.top_p} above 0 and at most 1"
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: also where the temperature is too small to divide by."""
        return self.temperature < 1e-4

    def sampler(self, device: torch.device) -> Callable[[Tensor], int]:
        """What draws one token after the other from logits `(vocab,)`."""
        if self.greedy:
            return lambda logits: int(logits.argmax())
        generator = torch.Generator(device)
        generator.manual_seed(self.seed) if self.seed is not None else generator.seed()

        nothing = torch.empty(1, 0, dtype=torch.long)
        cuts = [TopKLogitsWarper(self.top_k)] if self.top_k else []
        cuts += [TopPLogitsWarper(self.top_p)] if self.top_p < 1 else []

        def draw(logits: Tensor) -> int:
            scores = logits / self.temperature
            for cut in cuts:
                scores = cut(nothing, scores[None])[0]
            return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))

        return draw


GREEDY = Drawing()


@dataclass(frozen=True)
class Step:
    """One more token.

    Attributes:
        answer: the ids drawn so far, this one included.
        logits: what it was drawn from, float32 `(vocab,)`.
        ended: whether it ends a text or a turn.
    """

    answer: list[int]
    logits: Tensor
    ended: bool

    @property
    def token(self) -> int:
        """The new token."""
        return self.answer[-1]


Watch = Callable[[Step], bool]
"""Called with every step; True ends the answer there."""


class Decoder:
    """Draws one token after the other; whoever asks for the next has the last one run first.

    Args:
        ends: whether a token ends a text or a turn; none of the first `min_tokens` does.
        device: where the logits are.
    """

    def __init__(
        self, ends: Callable[[int], bool], drawing: Drawing, device: torch.device, *, min_tokens: int = 0
    ) -> None:
        self._ends, self._draw, self._min_tokens = ends, drawing.sampler(device), min_tokens
        self._answer: list[int] = []

    def draw(self, logits: Tensor) -> Step:
        """The next token, from the logits after the last one, float32 `(vocab,)`."""
        token, allowed = self._draw(logits), logits
        while len(self._answer) < self._min_tokens and self._ends(token):
            allowed = allowed.clone() if allowed is logits else allowed
            allowed[token] = -torch.inf
            token = self._draw(allowed)
        self._answer.append(token)
        return Step(self._answer, logits, self._ends(token))


def steps(
    logits: Tensor,
    advance: Callable[[int], Tensor],
    ends: Callable[[int], bool],
    drawing: Drawing = GREEDY,
    *,
    min_tokens: int = 0,
) -> Iterator[Step]:
    """Continue after `logits`, without end.

    Args:
        advance: runs a token behind those before; returns the logits after it, float32 `(vocab,)`.
        ends, min_tokens: as of `Decoder`.
    """
    decoder = Decoder(ends, drawing, logits.device, min_tokens=min_tokens)
    while True:
        step = decoder.draw(logits)
        yield step
        logits = advance(step.token)
