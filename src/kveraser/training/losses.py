"""The terms of the distillation loss.

Knows: logits. Does not know how they were made.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kveraser.evaluation.metrics import kl_divergence


def distillation_loss(
    teacher: Tensor, student: Tensor, targets: Tensor, gold: Tensor, cross_entropy_weight: float = 0.0
) -> Tensor:
    """KL to the teacher plus weighted cross-entropy on the tokens of gold answers, `(tokens,)` float32.

    Args:
        teacher, student: logits `(tokens, vocab)` that predict `targets`.
        targets: `(tokens,)` ids.
        gold: `(tokens,)` bool, which targets belong to a gold answer.
    """
    loss = kl_divergence(teacher, student)
    if cross_entropy_weight:
        entropy = F.cross_entropy(student.float(), targets, reduction="none")
        loss = loss + cross_entropy_weight * torch.where(gold, entropy, 0.0)
    return loss
