"""What is stored beside an adapter: how the eraser attends, and which backbone it was made for.

Knows: `kveraser.json`. Does not know about LoRA layers.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kveraser.cache import Window
from kveraser.errors import EraserMismatchError
from kveraser.model_view import causal_lm, text_config

FILE_NAME = "kveraser.json"
FORMAT = 1
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
        last_norm = [p for name, p in causal_lm(model).named_parameters() if "norm" in name and p.ndim == 1]
        samples: list[float] = []
        for weight in (embedding, *last_norm[:1]):
            flat = weight.detach().reshape(-1)
            places = sampled_places(flat.numel())
            samples += [round(value, 8) for value in flat[places.to(flat.device)].float().tolist()]
        return cls(shape, samples)

    def difference(self, model: nn.Module) -> str | None:
        """What differs between `model` and the fingerprinted one, in words; None when it is the same backbone."""
        return self.difference_to(Fingerprint.of(model))

    def difference_to(self, other: Fingerprint) -> str | None:
        """What differs between another fingerprint and this one, in words; None when both are of one backbone."""
        for key, value in self.shape.items():
            if other.shape.get(key) != value:
                return f"{key} is {other.shape.get(key)}, the eraser's backbone has {value}"
        mine, theirs = torch.tensor(self.weights), torch.tensor(other.weights)
        if (mine - theirs).norm() > 2e-2 * mine.norm():
            return "the shapes agree but the weights are other ones"
        return None


@dataclass(frozen=True)
class EraserConfig:
    """`kveraser.json`.

    Attributes:
        fingerprint: the backbone the eraser was made for.
        window: `(sink, local)` slots the eraser attends to besides the span; None for the whole prefix.
        repair: live tokens behind the span to recompute with the backbone after steering.
        notes: anything else worth keeping (how it was trained).
    """

    fingerprint: Fingerprint
    window: Window | None = None
    repair: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write `kveraser.json` into `folder`."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=2, sort_keys=True)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> EraserConfig:
        """Read a `kveraser.json`.

        Raises:
            EraserMismatchError: not a readable file of this format.
        """
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            if data["format"] > FORMAT:
                raise EraserMismatchError(
                    f"{file} has format {data['format']}, this version reads {FORMAT}; update kveraser"
                )
            window = data.get("window")
            return cls(
                fingerprint=Fingerprint(**data["fingerprint"]),
                window=None if window is None else (int(window[0]), int(window[1])),
                repair=int(data.get("repair", 0)),
                notes=dict(data.get("notes", {})),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, EraserMismatchError):
                raise
            raise EraserMismatchError(f"{file} cannot be read as an eraser's configuration: {error!r}") from error
