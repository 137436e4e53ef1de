"""Telling backbones apart: by their shape, and by a few of their weights.

Knows: transformers' configurations and parameters. Does not know what is kept for a backbone (erasers, probes, sessions).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from kveraser.files import digest_json
from kveraser.model.view import causal_lm, text_config

_SAMPLES = 32
_SHAPE_KEYS = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "vocab_size")  # fmt: skip


def sampled_places(count: int) -> Tensor:
    """Where in a flat weight of `count` values a fingerprint looks, `(16,)` int64."""
    return torch.linspace(0, count - 1, _SAMPLES // 2, dtype=torch.float64).long()


@dataclass(frozen=True)
class Fingerprint:
    """Tells backbones apart: their shape, and a few weights (of any floating-point type).

    Attributes:
        shape: entries of the model's configuration.
        weights: values at fixed places of the first attention projection and of the input embedding.
    """

    shape: dict[str, Any]
    weights: list[float]

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module) -> Fingerprint:
        """The fingerprint of a model."""
        config = text_config(model)
        shape = {key: getattr(config, key, None) for key in _SHAPE_KEYS}
        embedding = causal_lm(model).get_input_embeddings().weight
        norms = (p for name, p in causal_lm(model).named_parameters() if "norm" in name and p.ndim == 1)
        samples: list[float] = []
        for weight in (embedding, *islice(norms, 1)):
            flat = weight.detach().reshape(-1)
            places = sampled_places(flat.numel())
            samples += [round(value, 8) for value in flat[places.to(flat.device)].float().tolist()]
        return cls(shape, samples)

    @property
    def in_short(self) -> dict[str, Any]:
        """The shape, and a digest of the weights that is the same in every type they are kept in."""
        rough = torch.tensor(self.weights).bfloat16().tolist()
        return {**self.shape, "weights": digest_json(rough)[:12]}

    def difference(self, model: nn.Module) -> str | None:
        """What differs between `model` and the fingerprinted one, in words; None when it is the same backbone."""
        return self.difference_to(Fingerprint.of(model))

    def difference_to(self, other: Fingerprint) -> str | None:
        """What differs between another fingerprint and this one, in words; None when both are of one backbone."""
        for key, value in self.shape.items():
            if other.shape.get(key) != value:
                return f"{key} is {other.shape.get(key)}, it was made for {value}"
        mine, theirs = torch.tensor(self.weights), torch.tensor(other.weights)
        if mine.shape != theirs.shape or (mine - theirs).norm() > 2e-2 * mine.norm():
            return "the shapes agree but the weights are other ones"
        return None
