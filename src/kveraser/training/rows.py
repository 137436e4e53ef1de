"""Many short pieces of text in one forward: segments packed in a row over a shared past.

Knows: models, masks, positions. Does not know what the segments are for.

A *segment* is some tokens, mostly at consecutive positions. They attend causally to each other and to chosen slots (4-D mask).
Packing needs no padding: every token that is computed is one that was asked for. The past is a list of pieces of keys and
values, constant or differentiable, joined layer by layer; behind its slots come those of the row itself, so that a
segment can attend to what an earlier one of the row is just computing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from kveraser.cache import StandInLayer, additive
from kveraser.model.kernels import without_cudnn
from kveraser.model.view import decoder, evaluating, model_device
from kveraser.spans import Span

States = list[tuple[Tensor, Tensor]]
"""Per layer, keys and values `(1, kv_heads, tokens, head_dim)`."""


_PACK_TOKENS = {"cpu": 256}
_PACK_TOKENS_ELSEWHERE = 4096


@dataclass(frozen=True)
class Segment:
    """Some tokens that are computed together, and attend causally to each other.

    Attributes:
        ids: the tokens.
        positions: of each, rising.
        sees: `(n,)` int64, slots that they attend to, of the past and of earlier segments.
        shown: `(tokens, n)` bool, which of these slots each token attends to; None: all of them.
        stand_for: `(n,)` float32, how many slots like it each of these stands for; None: for itself alone.
    """

    ids: Sequence[int]
    positions: Sequence[int]
    sees: Tensor
    shown: Tensor | None = None
    stand_for: Tensor | None = None

    @classmethod
    def run(cls, ids: Sequence[int], start: int, sees: Tensor) -> Segment:
        """Tokens at consecutive positions."""
        return cls(ids, range(start, start + len(ids)), sees)

    def __len__(self) -> int:
        return len(self.ids)


def slot_range(start: int, end: int) -> Tensor:
    """The slots from `start` to `end`, `(n,)` int64."""
    return torch.arange(start, max(end, start))


def pack_tokens(device: torch.device) -> int:
    """Tokens per forward that packing aims at: more of them make attention between strangers dearer than it saves."""
    return _PACK_TOKENS.get(device.type, _PACK_TOKENS_ELSEWHERE)


class _Joined(StandInLayer):
    """Pieces of keys and values shown as one; remembers what a pass adds."""

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__(sum(int(keys.shape[-2]) for keys, _ in pieces))
        self.pieces = pieces
        self.added: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.added = (key_states, value_states)
        pieces = [*self.pieces, self.added]
        return torch.cat([keys for keys, _ in pieces], -2), torch.cat([values for _, values in pieces], -2)


def _mask(row: Sequence[Segment], past: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`(tokens, past + tokens)`: what is added to the scores, so that each token attends to what it should."""
    places = places_of(row)
    width = places[-1].end
    seen = torch.zeros(width, past + width, dtype=torch.bool, device=device)
    for segment, place in zip(row, places, strict=True):
        own = seen[place.slice]
        own[:, segment.sees.to(device)] = True if segment.shown is None else segment.shown.to(device)
        causal = torch.ones(len(place), len(place), dtype=torch.bool, device=device).tril()
        own[:, past + place.start : past + place.end] = causal
    mask = additive(seen, dtype)
    for segment, place in zip(row, places, strict=True):
        if segment.stand_for is not None:  # n slots of the same key and value weigh n times as much as one
            mask[place.slice, segment.sees.to(device)] += segment.stand_for.log().to(mask)
    return mask


def places_of(row: Sequence[Segment]) -> list[Span]:
    """Where each segment stands in the row."""
    ends = list(accumulate(map(len, row)))
    return [Span(end - len(segment), end) for segment, end in zip(row, ends, strict=True)]


def run_row(model: nn.Module, row: Sequence[Segment], past: Sequence[States]) -> tuple[Tensor, States]:
    """Run a row of segments over a past.

    Args:
        past: pieces, each with its states per layer; joined in order they are the slots that segments refer to.

    Returns:
        Last hidden states `(tokens, hidden)`, and per layer the new keys and values.
    """
    device, body = model_device(model), decoder(model)
    slots = sum(int(piece[0][0].shape[-2]) for piece in past)
    ids = [token for segment in row for token in segment.ids]
    positions = [at for segment in row for at in segment.positions]
    layers = [_Joined([piece[index] for piece in past]) for index in range(body.config.num_hidden_layers)]
    dtype = past[0][0][0].dtype if past else body.get_input_embeddings().weight.dtype
    mask = _mask(row, slots, device, dtype)
    with without_cudnn():
        output = evaluating(body)(
            input_ids=torch.tensor([ids], device=device), position_ids=torch.tensor([positions], device=device),
            past_key_values=Cache(layers=list(layers)), attention_mask=mask[None, None], use_cache=True,
        )  # fmt: skip
    added = [layer.added for layer in layers if layer.added is not None]
    return output.last_hidden_state[0], added
