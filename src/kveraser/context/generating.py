"""Generating token by token, for backends whose engine brings no generation of its own.

Knows: logits, sampling. Does not know how tokens are run, or what a context is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kveraser.errors import OptionError

Criterion = Callable[[Tensor, Tensor], Any]


def generate(
    run: Callable[[list[int]], Tensor],
    first: list[int],
    seen: list[int],
    ends: Callable[[int], bool],
    *,
    max_new_tokens: int,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    stopping_criteria: Sequence[Criterion] = (),
) -> list[int]:
    """Continue; returns the new ids, the last of which has not been run.

    Args:
        run: runs tokens behind those it ran before; returns the logits after the last, `(vocab,)`.
        first: tokens to run first.
        seen: ids that criteria see before the answer.
        ends: whether a token ends the answer.
        max_new_tokens, min_new_tokens: at most and at least so many.
        temperature: 0 takes the most likely token.
        top_p: sample from the smallest set of tokens that has this probability.
        seed: the same seed gives the same answer; None draws one.
        stopping_criteria: called with the ids seen and new `(1, tokens)` and the logits `(1, vocab)`, as transformers does; the
            answer ends when one says so.

    Raises:
        OptionError: an impossible option.
    """
    if max_new_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise OptionError(
            f"max_new_tokens={max_new_tokens} must be at least 1, temperature={temperature} at least 0, "
            f"top_p={top_p} above 0 and at most 1"
        )
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    answer: list[int] = []
    while True:
        logits = run(answer[-1:] or first)
        token = _sample(logits, temperature, top_p, generator)
        while len(answer) < min_new_tokens and ends(token):
            logits[token] = -torch.inf
            token = _sample(logits, temperature, top_p, generator)
        answer.append(token)
        ids = torch.tensor([[*seen, *answer]])
        done = ends(token) or len(answer) >= max_new_tokens
        if done or any(bool(torch.as_tensor(stop(ids, logits[None])).all()) for stop in stopping_criteria):
            return answer


def _sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    if temperature < 1e-4:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        return int(order[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))
