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

from kveraser.tasks.answers import normalise, says

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


def short_answers(answer: str, gold: str) -> tuple[str, ...]:
    """The parts of an answer that are compared with the gold one: its first line, up to the end of its first sentence.

    Where the gold answer itself has what looks like the end of a sentence ("Kramer vs. Kramer"), also up to as many ends as that has.
    """
    line, gold = answer.strip().split("\n")[0], gold.strip()
    within = sum(found.end() < len(gold) for found in _SENTENCE_END.finditer(gold))
    ends = [found.start() for found in _SENTENCE_END.finditer(line)] + [len(line)]
    return tuple(line[: ends[min(count, len(ends) - 1)]].strip() for count in ((0, within) if within else (0,)))


def exact_match(answer: str, gold: str) -> bool:
    """Whether the short form of an answer is the gold answer, both normalised."""
    return normalise(gold) in map(normalise, short_answers(answer, gold))


def f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words of an answer's short form, as SQuAD's scorer has it."""
    return max(_overlap(normalise(short), normalise(gold)) for short in short_answers(answer, gold))


def _overlap(answer: str, gold: str) -> float:
    said, wanted = answer.split(), gold.split()
    if not said or not wanted:
        return float(said == wanted)
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


def leaks(answer: str, erased: str) -> bool:
    """Whether an answer says the erased value, as whole words."""
    return says(answer, erased)
