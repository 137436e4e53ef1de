"""What is measured of an answer.

Knows: logits and strings. Does not know about models, caches or methods.
"""

from __future__ import annotations

import re
import string

from torch import Tensor
from torch.nn import functional as F

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def kl_divergence(recompute: Tensor, method: Tensor) -> Tensor:
    """KL(recompute || method) per token, in nats: how far a method is from full recomputation.

    Args:
        recompute, method: logits `(tokens, vocab)` over the same answer tokens.

    Returns:
        `(tokens,)` float32.
    """
    log_p, log_q = F.log_softmax(recompute.float(), -1), F.log_softmax(method.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def normalise(text: str) -> str:
    """Lower case without punctuation, articles and extra spaces (as SQuAD's scorer does)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, gold: str) -> bool:
    """Whether the first line of an answer begins with the gold answer, or is it."""
    first = normalise(answer.strip().split("\n")[0])
    wanted = normalise(gold)
    return first == wanted or f" {first} ".startswith(f" {wanted} ")


def leaks(answer: str, erased: str) -> bool:
    """Whether an answer says the erased value, as whole words."""
    return f" {normalise(erased)} " in f" {normalise(answer)} "
