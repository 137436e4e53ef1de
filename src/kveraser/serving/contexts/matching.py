"""What of a cached context a request can use: the runs of it to be kept, and what stands between them now.

Knows: integers. Does not know about models, messages or caches.

A request's ids are the cached ids with some runs taken out, replaced or put in, then new ids. Ids match exactly or not at all. Of the runs in
which the two are equal (`blocks`), those are kept which save the most together: what is kept need not be run, and every change has a price. Between
them equal runs are looked for again, so that what is said again and again (the markup of calls) is found as well. All of that is done a few times, and at most
`MAX_BLOCKS` runs are weighed: the cost is linear in the context, but for sorting.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from kveraser.serving.contexts.blocks import GRAM, MAX_BLOCKS, Block, Ids, common_length, equal_blocks

MIN_KEPT = 2
"""Ids that are kept between two changes, at least."""
WORTH = 0.1
"""Changes are made in place where that saves at least this share of the tokens that would be run otherwise."""

_ROUNDS = 3
_IMPOSSIBLE = -(1 << 60)


@dataclass(frozen=True)
class Change:
    """Cached ids `[start, end)`, at least one, are ids `[new_start, new_end)` of the request now; or gone, where these are none."""

    start: int
    end: int
    new_start: int
    new_end: int

    @property
    def removed(self) -> int:
        """Cached ids that are not there any more."""
        return self.end - self.start

    @property
    def added(self) -> int:
        """Ids that are there in their place."""
        return self.new_end - self.new_start


@dataclass(frozen=True)
class Prices:
    """What changes take, in tokens that are run, besides their new ids.

    Attributes:
        change: for each change, at least: the tokens that have read what was there.
        readers: for each id that was there, where these are more.
        removed: for each id that is taken out without another in its place.
        may_grow: whether more ids can be put in a place than were there.
    """

    change: int = 0
    removed: int = 1
    may_grow: bool = True
    readers: int = 0


NO_EXTRAS = Prices()
"""Nothing but what is taken out is run again."""


@dataclass(frozen=True)
class Match:
    """How a request uses a cached context.

    Attributes:
        prefix: ids that the two share from the beginning.
        changes: in order; something is kept behind each of them.
        kept_until: cached ids from here on are not used.
        new_from: request ids from here on are not cached.
        gain: ids that need not be run, less what has to be run for the changes besides their new ids; without changes where they are
            not worth being made.
        worth_it: whether making the changes in place saves enough.
    """

    prefix: int
    changes: tuple[Change, ...]
    kept_until: int
    new_from: int
    gain: int
    worth_it: bool = True


def match(
    cached: Sequence[int] | Ids,
    wanted: Sequence[int] | Ids,
    *,
    starts: Set[int] = frozenset(),
    prices: Prices = NO_EXTRAS,
    worth: float = WORTH,
    gram: int = GRAM,
) -> Match:
    """The use of a cached context that saves the most; at worst one that keeps nothing.

    Args:
        starts: ids that begin a message; a run that may as well begin at one of them does.
        prices: what changes take.
        worth: as `WORTH`.
        gram: ids in a row by which equal runs are found.
    """
    have, want = np.asarray(cached, dtype=np.int64), np.asarray(wanted, dtype=np.int64)
    prefix = common_length(have, want)
    kept, gain = _kept(have, want, Block(0, 0, prefix), prices, gram)
    until, resumed = kept[-1].at + kept[-1].length, kept[-1].new + kept[-1].length
    changes = _changes(have, kept, starts)
    if changes and gain - prefix < worth * (len(want) - prefix):
        return Match(prefix, changes, until, resumed, prefix, worth_it=False)
    return Match(prefix, changes, until, resumed, gain)


def _kept(have: Ids, want: Ids, root: Block, prices: Prices, gram: int) -> tuple[list[Block], int]:
    """The blocks that save the most together, and what they save. What both have once is looked for in all, then between what was found."""
    blocks, kept, gain = [root], [root], root.length
    seen: set[tuple[int, int, int, int]] = set()
    for _ in range(_ROUNDS):
        gaps = [gap for gap in _gaps(have, want, kept) if gap not in seen]
        seen.update(gaps)
        new = [
            Block(block.at + a, block.new + c, block.length)
            for a, b, c, d in gaps
            for block in equal_blocks(have[a:b], want[c:d], gram)
        ]
        if not new:
            break
        longest = sorted((*blocks[1:], *new), key=lambda block: -block.length)[:MAX_BLOCKS]
        blocks = [root, *sorted(longest, key=lambda block: (block.new, block.at))]
        kept, gain = _best_chain(blocks, prices)
    return kept, gain


def _gaps(have: Ids, want: Ids, kept: list[Block]) -> list[tuple[int, int, int, int]]:
    """What stands between the blocks that are kept, and behind them: where it begins and ends in the two."""
    ends = [(block.at + block.length, block.new + block.length) for block in kept]
    starts = [*((block.at, block.new) for block in kept[1:]), (len(have), len(want))]
    return [(a, b, c, d) for (a, c), (b, d) in zip(ends, starts, strict=True) if a < b and c < d]


def _best_chain(blocks: list[Block], prices: Prices) -> tuple[list[Block], int]:
    """The blocks to be kept, the first among them, cut so that none overlaps the one before; and their gain."""
    at, new, length = np.array([(block.at, block.new, block.length) for block in blocks], dtype=np.int64).T
    gain = np.zeros(len(blocks), dtype=np.int64)
    before = np.full(len(blocks), -1)
    gain[0] = length[0]
    for index in range(1, len(blocks)):
        _, left, price = _step(at, new, length, index, prices)
        total = np.where(price < 0, _IMPOSSIBLE, gain[:index] + left - price)
        before[index] = int(np.argmax(total))
        gain[index] = total[before[index]]
    index = last = int(np.argmax(gain))
    chain: list[Block] = []
    while index > 0:
        earlier = int(before[index])
        cut = int(_step(at, new, length, index, prices)[0][earlier])
        chain.append(Block(int(at[index]) + cut, int(new[index]) + cut, int(length[index]) - cut))
        index = earlier
    return [blocks[0], *reversed(chain)], int(gain[last])


def _step(
    at: NDArray[np.int64], new: NDArray[np.int64], length: NDArray[np.int64], index: int, prices: Prices
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Going on with a block behind each of those before it: what has to be cut off, what is left, the price (-1: it cannot be)."""
    end_at, end_new = (at + length)[:index], (new + length)[:index]
    cut = np.maximum(np.maximum(end_at - at[index], end_new - new[index]), 0)
    left = length[index] - cut
    removed, added = at[index] + cut - end_at, new[index] + cut - end_new
    price = np.maximum(prices.change, prices.readers * removed) + prices.removed * np.maximum(removed - added, 0)
    possible = (left >= MIN_KEPT) & (prices.may_grow | (added <= removed))
    return cut, left, np.where(possible, price, -1)


def _changes(have: Ids, kept: list[Block], starts: Set[int]) -> tuple[Change, ...]:
    """What stands between the blocks that are kept."""
    changes: list[Change] = []
    for left, right in pairwise(kept):
        change = Change(left.at + left.length, right.at, left.new + left.length, right.new)
        if change.removed == 0:  # something was put in: the id before it, or behind it, is given up with it
            step = (-1, 0) if left.length else (0, 1)
            change = Change(
                change.start + step[0], change.end + step[1], change.new_start + step[0], change.new_end + step[1]
            )
        elif change.added == 0:
            change = _begin_at_message(have, change, changes[-1].end + 1 if changes else 0, starts)
        changes.append(change)
    return tuple(changes)


def _begin_at_message(have: Ids, change: Change, floor: int, starts: Set[int]) -> Change:
    """The same run taken out, moved to the left to the beginning of a message where the ids allow it."""
    start, end = change.start, change.end
    while starts and int(have[start]) not in starts:
        if start <= floor or have[start - 1] != have[end - 1]:
            return change
        start, end = start - 1, end - 1
    moved = change.start - start
    return Change(start, end, change.new_start - moved, change.new_end - moved)
