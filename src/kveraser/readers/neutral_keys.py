"""Keys that no query likes: what is written where nothing shall ever be attended to.

Knows: queries, softmax denominators, rotary embeddings, gradient descent on a few numbers. Does not know about caches.

The queries of a head share a direction (it is what attention sinks live on), so one key per layer and key head can be made
to score far below everything else for all of them. It is given as at position 0 and turned to the last position of a
context before it is written; queries up to thousands of positions behind that are part of the fit, which therefore lives
on the slow rotary dimensions by itself. With a value of zero, such a slot is as good as hidden. The idea is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kveraser.readers.probes import Turning

REACH = 8192
"""So many positions behind the key, queries are part of the fit (of a model with rotary dimensions that are slow enough)."""
_DRAWS = 12
"""Of how far behind the key a query is, for each of them."""
_WANTED = 40.0
"""Nats below the denominator that the score of every query of the fit shall be."""
_MOST_TURNED = 0.8
"""Radians by which the slowest rotary dimension may have turned at the farthest of these."""
_STEPS = 150
_TOKENS = 256
_UNLIKE = 4
"""First tokens of a text, which are unlike all others."""
_LONGEST = 200.0
"""Longest key, in multiples of the square root of its dimensions."""


@torch.no_grad()
def neutral_keys(queries: list[Tensor], denominators: list[Tensor], scalings: list[float], groups: int,
                 turning: Turning, positions: Tensor) -> Tensor:  # fmt: skip
    """One key per layer and key head, as at position 0, `(layers, kv_heads, head_dim)` float32.

    Args:
        queries: per layer `(heads, tokens, head_dim)`, rotated.
        denominators: per layer `(heads, tokens)`, logarithms of their softmax denominators.
        scalings: per layer, of the scores.
        groups: key heads.
        positions: `(tokens,)`.
    """
    step = max(len(positions) // _TOKENS, 1)
    chosen = torch.arange(len(positions) - 1, -1, -step, device=positions.device)[:_TOKENS]  # of a text's end first
    chosen = chosen[chosen >= min(_UNLIKE, len(positions) - 1)]
    back = turning.at(positions[chosen])
    farthest = min(REACH, int(_MOST_TURNED / turning.slowest))
    generator = torch.Generator().manual_seed(0)
    drawn = (farthest + 1) ** torch.rand(_DRAWS, len(chosen), generator=generator)  # as many near as far
    ahead = [turning.at(reach) for reach in (drawn - 1).long().to(positions.device)]
    found = []
    for layer, (all_queries, whole, scaling) in enumerate(zip(queries, denominators, scalings, strict=True)):
        at_origin = back.to_origin(all_queries[:, chosen].float(), layer)
        heads, count, size = at_origin.shape
        seen = torch.stack([turns.to_place(at_origin, layer) for turns in ahead], 1)
        rows = (seen * scaling).reshape(groups, -1, size)
        wanted = whole[:, None, chosen].expand(heads, len(ahead), count).reshape(groups, -1)
        found.append(_dislike(rows, wanted))
    return torch.stack(found)


def _dislike(rows: Tensor, whole: Tensor) -> Tensor:
    """Keys `(groups, head_dim)` whose score with every one of the queries is as far below its denominator as can be.

    Args:
        rows: `(groups, queries, head_dim)`, scaled.
        whole: `(groups, queries)`.
    """
    second = rows.transpose(1, 2) @ rows / rows.shape[1]
    second.diagonal(dim1=1, dim2=2).add_(1e-2 * second.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True) + 1e-9)
    keys: Tensor = -torch.linalg.solve(second, rows.mean(1)[..., None])[..., 0]
    worst = _worst(rows, keys)
    keys = keys * (_WANTED / worst.abs().clamp(min=1e-3)).clamp(max=1.0).unsqueeze(-1)
    size = rows.square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-6)[..., 0]
    first, moment, rate = torch.zeros_like(keys), torch.zeros_like(keys), 0.5 / size
    best, lowest = keys, torch.full((len(keys),), torch.inf, device=keys.device)
    for index in range(1, _STEPS + 1):  # Adam on the log of the mean weight that the slot would get
        scores = (rows @ keys[..., None])[..., 0] - whole
        loss = scores.logsumexp(-1)
        better = loss < lowest
        best, lowest = torch.where(better[:, None], keys, best), torch.where(better, loss, lowest)
        gradient = (scores.softmax(-1)[:, None] @ rows)[:, 0]
        first = 0.9 * first + 0.1 * gradient
        moment = 0.99 * moment + 0.01 * gradient.square()
        step = (first / (1 - 0.9**index)) / ((moment / (1 - 0.99**index)).sqrt() + 1e-9)
        keys = keys - rate * step * (1 - index / (_STEPS + 1))
        longest = _LONGEST * keys.shape[-1] ** 0.5
        keys = keys * (longest / keys.norm(dim=-1, keepdim=True).clamp(min=longest))
    worst = _worst(rows, best, whole)
    return best * (_WANTED / worst.neg().clamp(min=1e-3)).clamp(max=1.0)[:, None]  # further than wanted: nearer again


def _worst(rows: Tensor, keys: Tensor, whole: Tensor | None = None) -> Tensor:
    scores = (rows @ keys[..., None])[..., 0]
    return (scores if whole is None else scores - whole).amax(-1)
