"""One new token for each of several caches, all in one forward.

Knows: caches that grow, gaps, transformers' attention interface. Does not know what the tokens are for.

What a forward of a single token costs on a CPU is reading the weights. Here they are read once for all: the tokens stand side by side
as if they were one text, so that every linear layer sees them together, each at its own position. Only attention is done for each by
itself, over the keys and values of its own cache, which is as long as it is: nothing is padded, nothing copied.

    tokens        a  b  c            one row of a forward, at positions 7, 812, 40
    attention     a over cache A,  b over cache B,  c over cache C
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from kveraser.cache.closing import Gaps
from kveraser.cache.marks import get_marks
from kveraser.cache.stand_in import StandInLayer
from kveraser.cache.surgery import truncate
from kveraser.errors import UnsupportedCacheError
from kveraser.interrupts import uninterrupted
from kveraser.model.attention import for_telling, one_token_attention
from kveraser.model.view import causal_lm


class _RowsLayer(StandInLayer):
    """One layer of every cache: takes the new state of each, and lets each token attend to what is in its own."""

    def __init__(self, layers: Sequence[DynamicLayer], gaps: Sequence[Gaps | None], index: int) -> None:
        super().__init__(0)
        self.layers, self.gaps, self.index = layers, gaps, index
        self.attended = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for layer, key, value in zip(self.layers, key_states.split(1, 2), value_states.split(1, 2), strict=True):
            layer.update(key, value)
        key_states.attend = self.attend  # type: ignore[attr-defined]
        return key_states, value_states

    def attend(self, query: Tensor, scaling: float) -> Tensor:
        """Attention of all tokens, `(1, tokens, heads, head_dim)`."""
        self.attended = True
        found = []
        for layer, gaps, own in zip(self.layers, self.gaps, query.split(1, 2), strict=True):
            keys, values = layer.keys, layer.values
            assert keys is not None and values is not None
            if gaps is None:
                found.append(one_token_attention(own, keys, values, scaling))
            else:
                found.append(gaps.attend(own, keys, values, scaling, self.index))
        return torch.cat(found, 1)


def extend_rows(model: nn.Module, caches: Sequence[Cache], ids: Tensor) -> Tensor:
    """Run one token behind each of several caches and append its states; the logits after it, float32 `(caches, vocab)`.

    As if each were run by itself, across the gaps of its steered spans, but that sums are rounded as those of larger matrix products
    are. When it fails or is interrupted, every cache is as it was.

    Args:
        caches: different ones, none of them empty; of one row each, without padding.
        ids: `(caches,)`.

    Raises:
        UnsupportedCacheError: the model's attention cannot be done by another function.
    """
    lengths = [int(cache.get_seq_length()) for cache in caches]
    gaps = [Gaps.of(model, get_marks(cache).steered) for cache in caches]
    layers = [_RowsLayer(each, gaps, index) for index, each in enumerate(zip(*(c.layers for c in caches), strict=True))]
    try:
        with torch.no_grad():
            output = for_telling(model)(
                input_ids=ids[None],
                position_ids=torch.tensor([lengths], device=ids.device),
                past_key_values=Cache(layers=list(layers)),
                use_cache=True,
            )
        if not all(layer.attended for layer in layers):
            raise UnsupportedCacheError(
                f"{type(causal_lm(model)).__name__} does not use transformers' attention interface in every layer, so tokens "
                "of several contexts cannot be run together; run them one after the other"
            )
        logits: Tensor = output.logits[0].float()
        return logits
    except BaseException:
        with uninterrupted():
            for cache, length in zip(caches, lengths, strict=True):
                truncate(cache, length)
        raise
