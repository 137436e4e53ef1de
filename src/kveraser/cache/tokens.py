"""What a pass needs to know of the tokens whose states are in a cache.

Knows: ids, positions, padding. Does not know about states or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kveraser.errors import OptionError
from kveraser.spans import Span


def whole_numbers(token_ids: Sequence[int] | Tensor) -> Tensor:
    """Token ids as a tensor.

    Raises:
        OptionError: they are no integers.
    """
    try:
        given = torch.as_tensor(token_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"token ids must be integers, a list or a tensor of them; got {token_ids!r:.60} ({error})"
        ) from error
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype is torch.bool):
        example = given.reshape(-1)[:1].tolist()
        raise OptionError(
            f"token ids must be integers, got {given.dtype} such as {example}; give what the tokenizer gave"
        )
    return given


def slots_of(runs: Iterable[Span], device: torch.device) -> Tensor:
    """The slots of some runs, one run after the other, `(n,)` int64."""
    return torch.cat([torch.arange(0), *(torch.arange(run.start, run.end) for run in runs)]).to(device)


@dataclass(frozen=True)
class Tokens:
    """What a pass needs to know of the tokens whose states are in a cache.

    Attributes:
        ids: `(batch, tokens)` int64, one per slot.
        positions: `(batch, tokens)` int64, or None where slot `i` has position `i` in every row.
        mask: `(batch, tokens)`, 0 where a slot is padding; None where none is.
    """

    ids: Tensor
    positions: Tensor | None = None
    mask: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of slots."""
        return self.ids.shape[1]

    def position(self, span: Span) -> Tensor:
        """Positions of the slots in `span`, `(batch or 1, tokens)`."""
        if self.positions is not None:
            return self.positions[:, span.slice]
        return torch.arange(span.start, span.end, device=self.ids.device)[None]

    def head(self, length: int) -> Tokens:
        """The first `length` of the tokens."""
        parts = [None if part is None else part[:, :length] for part in (self.positions, self.mask)]
        return Tokens(self.ids[:, :length], parts[0], parts[1])

    def without(self, spans: Sequence[Span]) -> Tokens:
        """The tokens that are left when the slots `spans` are cut out: what was behind them moves up."""
        if not spans:
            return self
        keep = torch.ones(self.length, dtype=torch.bool, device=self.ids.device)
        for span in spans:
            keep[span.slice] = False
        mask = None if self.mask is None else self.mask[:, keep]
        positions = self.positions
        if positions is not None:
            gone = torch.where(keep, 0, 1 if self.mask is None else self.mask.long())
            positions = (positions - gone.expand(positions.shape).cumsum(-1)).clamp(min=0)[:, keep]
        return Tokens(self.ids[:, keep], positions, mask)

    def opened(self, at: int, count: int) -> Tokens:
        """The tokens with room for `count` more (of id 0) from slot `at` on; what was behind it moves."""
        rows = self.ids.shape[0]
        room = self.ids.new_zeros(rows, count)
        positions, mask = self.positions, self.mask
        if positions is not None:
            before = positions[:, :at] if mask is None else positions[:, :at].masked_fill(mask[:, :at] == 0, -1)
            last = before.amax(-1, keepdim=True) if at else before.new_full((len(positions), 1), -1)
            fresh = last + 1 + torch.arange(count, device=positions.device)
            positions = torch.cat([positions[:, :at], fresh, positions[:, at:] + count], -1)
        if mask is not None:
            mask = torch.cat([mask[:, :at], mask.new_ones(rows, count), mask[:, at:]], -1)
        return Tokens(torch.cat([self.ids[:, :at], room, self.ids[:, at:]], -1), positions, mask)

    def with_ids(self, start: int, ids: Tensor) -> Tokens:
        """The tokens with other ids `(rows, n)` from slot `start` on."""
        changed = self.ids.clone()
        changed[:, start : start + ids.shape[1]] = ids
        return Tokens(changed, self.positions, self.mask)


def count_positions(mask: Tensor) -> Tensor:
    """Positions `(batch, tokens)` as `model.generate` counts them: real tokens from 0, padding anywhere."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
