"""Where two sequences of token ids are equal: maximal runs, found by what both of them have equally often.

Knows: integers. Does not know about models, messages, or what the runs are good for.

A few ids in a row (a gram) that occur once in the one sequence and once in the other tie the two together there; those that occur a few times
in both are taken in their order, as the markup of messages is. A tie is verified id by id and followed to both sides as far as the ids are equal. All
that is followed has a bound that is linear in the two, so that no ids make it slow: what is left then are ties that are shorter than they could be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

GRAM = 8
"""Ids in a row that tie two sequences together."""
MAX_BLOCKS = 256
"""Runs that are followed, at most: the longest of those that are certain."""

MAX_TIMES = 64
"""Times that a gram may occur in each of the two."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_FIRST_STEP = 64
_FOLLOWED, _FOLLOWED_ANYHOW = 2, 4096


@dataclass(frozen=True)
class Block:
    """The ids `[at, at + length)` of the one sequence are those `[new, new + length)` of the other."""

    at: int
    new: int
    length: int

    @property
    def diagonal(self) -> int:
        """What places of the two that belong together differ by."""
        return self.at - self.new


def equal_blocks(have: Ids, want: Ids, gram: int = GRAM, limit: int = MAX_BLOCKS) -> list[Block]:
    """The maximal equal runs that a tie is in, in the order of `want`; they may overlap, and cross in `have`.

    Args:
        gram: ids of a tie.
        limit: at most so many, of the longest that are certain before they are followed.
    """
    found: list[Block] = []
    rest = _FOLLOWED * (len(have) + len(want)) + _FOLLOWED_ANYHOW
    last: dict[int, int] = {}  # where in `want` the last block of a diagonal ends
    for tie in _longest(_ties(have, want, gram), limit):
        if tie.new < last.get(tie.diagonal, 0):
            continue
        end_at, end = tie.at + tie.length, tie.new + tie.length
        after = common_length(have[end_at : end_at + rest], want[end:])
        first = max(tie.at - rest + after, 0)
        before = common_length(have[first : tie.at][::-1], want[: tie.new][::-1])
        rest -= before + after
        found.append(Block(tie.at - before, tie.new - before, before + tie.length + after))
        last[tie.diagonal] = end + after
    return sorted(found, key=lambda block: (block.new, block.at))


def common_length(left: Ids, right: Ids) -> int:
    """Length of the common beginning."""
    length = min(len(left), len(right))
    done, step = 0, _FIRST_STEP
    while done < length:  # in growing steps, so that a short one is cheap
        end = min(done + step, length)
        different = np.flatnonzero(left[done:end] != right[done:end])
        if len(different):
            return done + int(different[0])
        done, step = end, step * 2
    return length


def _ties(have: Ids, want: Ids, gram: int) -> list[Block]:
    """Equal runs of which every gram occurs equally often in both, in the order of `want`."""
    if min(len(have), len(want)) < gram:
        return []
    (keys, times, at), (others, others_times, new) = _grams(have, gram), _grams(want, gram)
    _, first, second = np.intersect1d(keys, others, assume_unique=True, return_indices=True)
    alike = (times[first] == others_times[second]) & (times[first] <= MAX_TIMES)
    chosen = np.zeros(len(keys), dtype=bool), np.zeros(len(others), dtype=bool)
    chosen[0][first[alike]], chosen[1][second[alike]] = True, True
    at, new = at[np.repeat(chosen[0], times)], new[np.repeat(chosen[1], others_times)]
    order = np.argsort(new)
    at, new = at[order], new[order]
    same = np.ones(len(at), dtype=bool)
    for offset in range(gram):  # keys may be equal by chance
        same &= have[at + offset] == want[new + offset]
    at, new = at[same], new[same]
    if not len(at):
        return []
    begins = np.flatnonzero(np.concatenate([[True], (np.diff(at) != 1) | (np.diff(new) != 1)]))
    lengths = np.diff(np.concatenate([begins, [len(at)]])) + gram - 1
    return [Block(*map(int, each)) for each in zip(at[begins], new[begins], lengths, strict=True)]


def _grams(ids: Ids, gram: int) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Keys of the grams in order, how often each occurs, and all their places, in the order of keys and places."""
    values = ids.astype(np.uint64)
    count = len(values) - gram + 1
    keys = np.zeros(count, dtype=np.uint64)
    for offset in range(gram):
        keys = keys * _FACTOR + values[offset : offset + count]
    found, times = np.unique(keys, return_counts=True)
    return found, times, np.argsort(keys, kind="stable")


def _longest(ties: list[Block], limit: int) -> list[Block]:
    if len(ties) <= limit:
        return ties
    return sorted(sorted(ties, key=lambda tie: -tie.length)[:limit], key=lambda tie: tie.new)
