"""The next token in several versions of a session, where their answers part.

Knows: logits, token texts. Does not know how the versions were made or asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kveraser.context import ErasableContext
from kveraser.evaluation.metrics import kl_divergence

Version = Literal["before", "now", "recomputed"]


@dataclass(frozen=True)
class Distributions:
    """The next token in every version, where the answers part (where they do not: where the versions differ most).

    Attributes:
        after: what all answers have said up to there.
        tokens: the most likely tokens of all versions, the likeliest first.
        probabilities: of these tokens, by version.
        kl: KL(recomputed || version) in nats, by version; empty where nothing is erased.
    """

    after: str
    tokens: tuple[str, ...]
    probabilities: dict[Version, tuple[float, ...]]
    kl: dict[Version, float]


def distributions(
    context: ErasableContext,
    versions: Sequence[Version],
    answers: Sequence[Sequence[int]],
    logits: Sequence[Sequence[Tensor]],
    top: int,
) -> Distributions:
    """The next token where the answers part; where they do not, where the versions differ most.

    Args:
        context: for the text of tokens.
        answers: ids, by version.
        logits: `(vocab,)` each, of the first tokens of the answers, by version; the last version is compared with.
        top: the most likely tokens to report of every version.
    """
    steps = range(min(map(len, logits)))
    divergences = [[_kl(logits[-1][step], rows[step]) for rows in logits] for step in steps]
    parted = [step for step in steps if len({ids[step] for ids in answers}) > 1]
    step = parted[0] if parted else max(steps, key=lambda step: (sum(divergences[step]), -step))
    chances = [rows[step].softmax(-1) for rows in logits]
    likely = torch.cat([chance.topk(min(top, len(chance))).indices for chance in chances]).unique()
    likely = likely[torch.stack(chances)[:, likely].amax(0).argsort(descending=True)]
    return Distributions(
        after=context.decode(list(answers[0][:step])),
        tokens=tuple(_token_text(context, token) for token in likely.tolist()),
        probabilities={v: tuple(chance[likely].tolist()) for v, chance in zip(versions, chances, strict=True)},
        kl=dict(zip(versions, divergences[step], strict=True)) if len(versions) > 1 else {},
    )


def _kl(recomputed: Tensor, version: Tensor) -> float:
    return max(kl_divergence(recomputed[None], version[None]).item(), 0.0)


def _token_text(context: ErasableContext, token: int) -> str:
    assert context.tokenizer is not None
    return str(context.tokenizer.decode([token], clean_up_tokenization_spaces=False))
