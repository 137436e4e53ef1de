"""What is measured of an answer.

Knows: logits and strings. Does not know about models, caches or methods.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kveraser.tasks.answers import normalise

# Not behind an initial or a title: "J. Smith" and "St. Louis" go on.
_SENTENCE_END = re.compile(r"(?<!\b[A-Za-z])(?<!\b(?:Mr|Ms|Dr|St|Mt|Jr|Sr|No))(?<!\bMrs)[.!?](?=\s|$)")


def kl_divergence(recompute: Tensor, method: Tensor) -> Tensor:
    """KL(recompute || method) per token, in nats: how far a method is from full recomputation.

    Args:
        recompute, method: logits `(tokens, vocab)` over the same answer tokens.

    Returns:
        `(tokens,)` float32.
    """
    log_p, log_q = F.log_softmax(recompute.float(), -1), F.log_softmax(method.float(), -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def agreement(recompute: Tensor, method: Tensor) -> float:
    """Share of tokens for which both find the same token the most likely (top-1 agreement).

    Args:
        recompute, method: logits `(tokens, vocab)` over the same answer tokens.
    """
    return (recompute.argmax(-1) == method.argmax(-1)).float().mean().item()


def log_probability(logits: Tensor, ids: Sequence[int]) -> float:
    """Mean log-probability of tokens, in nats per token.

    Args:
        logits: `(tokens, vocab)`, row i predicts `ids[i]`.
    """
    targets = torch.tensor(list(ids), device=logits.device)
    return -F.cross_entropy(logits.float(), targets).item()


def short_answer(answer: str) -> str:
    """The part of an answer that is compared with the gold one: its first line, up to the end of its first sentence."""
    lines = answer.strip().split("\n")
    return _SENTENCE_END.split(lines[0], maxsplit=1)[0].strip()


def exact_match(answer: str, gold: str) -> bool:
    """Whether the short form of an answer is the gold answer, both normalised."""
    return normalise(short_answer(answer)) == normalise(gold)


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of an answer's short form, as SQuAD's scorer has it."""
    said, wanted = normalise(short_answer(answer)).split(), normalise(gold).split()
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def leaks(answer: str, erased: str) -> bool:
    """Whether an answer says the erased value, as whole words."""
    wanted = normalise(erased)
    return bool(wanted) and f" {wanted} " in f" {normalise(answer)} "
