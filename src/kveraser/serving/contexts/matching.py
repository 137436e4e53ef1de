"""What of a cached context a request can use: exact alignment of two sequences of token ids.

Knows: integers. Does not know about models, messages or caches.

A request's ids are the cached ids with some runs taken out, or replaced by a placeholder, then new ids. Ids match exactly
or not at all. Alignment is greedy: keep what is equal; where the two part, look for the next few ids of the request
further on in the cached ones. Every step is bounded, so the cost is linear in the context.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

MAX_REMOVALS = 16
"""Runs that one request may have taken out of a context."""
ANCHOR = 8
"""Equal ids in a row that count as the place where a request goes on (fewer where the cached ids end)."""
MAX_CANDIDATES = 32
"""Places that are looked at for one run."""


@dataclass(frozen=True)
class Removal:
    """Cached ids `[start, end)` are not in the request; `replaced` when the placeholder stands there instead."""

    start: int
    end: int
    replaced: bool = False


@dataclass(frozen=True)
class Match:
    """How a request uses a cached context.

    Attributes:
        removals: runs that are taken out, in order; something is kept behind each of them.
        kept_until: cached ids from here on are not used.
        new_from: request ids from here on are not cached.
    """

    removals: tuple[Removal, ...]
    kept_until: int
    new_from: int

    @property
    def prefix(self) -> int:
        """Ids that the two share from the beginning."""
        return self.removals[0].start if self.removals else self.kept_until

    @property
    def removed(self) -> int:
        """Cached ids that are taken out before something that is kept."""
        return sum(entry.end - entry.start for entry in self.removals)

    @property
    def kept(self) -> int:
        """Cached ids that are used."""
        return self.kept_until - self.removed

    @property
    def gain(self) -> int:
        """Ids that need not be run, less those that have to be run to take the removals out."""
        return self.kept - self.removed


def match(
    cached: Sequence[int] | Ids,
    wanted: Sequence[int] | Ids,
    *,
    placeholder: Sequence[int] = (),
    starts: Set[int] = frozenset(),
    max_removals: int = MAX_REMOVALS,
    anchor: int = ANCHOR,
) -> Match:
    """The alignment of a request with a cached context that saves the most; at worst one that keeps nothing.

    Args:
        placeholder: ids that may stand in the request for a run that was taken out.
        starts: ids that begin a message; where a run may as well begin at one of them, it does.
        max_removals: at most so many runs are taken out.
        anchor: equal ids behind a run that are needed to take it out.
    """
    have, want = np.asarray(cached, dtype=np.int64), np.asarray(wanted, dtype=np.int64)
    marker = np.asarray(placeholder, dtype=np.int64)
    at = new = _equal(have, want)
    removals: list[Removal] = []
    best = Match((), at, new)
    while len(removals) < max_removals and at < len(have) and new < len(want):
        floor = removals[-1].end if removals else 0
        step = _next_step(have, want, at, new, floor, marker, anchor)
        if step is None:
            break
        removal, new, length = step
        removals.append(_begin_at_message(have, removal, floor, starts))
        at, new = removal.end + length, new + length
        candidate = Match(tuple(removals), at, new)
        if candidate.gain > best.gain:
            best = candidate
    return best


def _equal(left: Ids, right: Ids) -> int:
    """Length of the common prefix."""
    length = min(len(left), len(right))
    done, step = 0, 64
    while done < length:  # in growing steps, so that a short prefix is cheap
        end = min(done + step, length)
        different = np.flatnonzero(left[done:end] != right[done:end])
        if len(different):
            return done + int(different[0])
        done, step = end, step * 2
    return length


def _next_step(
    have: Ids, want: Ids, at: int, new: int, floor: int, marker: Ids, anchor: int
) -> tuple[Removal, int, int] | None:
    """The run to take out where the two part at `have[at]`, `want[new]`: (run, where the request goes on, equal ids)."""
    openings = [(at, new, False)]
    for back in range(min(len(marker), at - floor, new) + 1 if len(marker) else 0):  # its first ids may be kept ones
        begin = new - back
        if np.array_equal(want[begin : begin + len(marker)], marker):
            openings.append((at - back, begin + len(marker), True))
    found: list[tuple[int, Removal, int, int]] = []
    for start, resume, replaced in openings:
        for end in _places(have, want[resume:], at if not replaced else start + 1, anchor):
            length = _equal(have[end:], want[resume:])
            if end > start and length and (length >= anchor or end + length == len(have)):
                found.append((length - (end - start), Removal(start, end, replaced), resume, length))
    if not found:
        return None
    _, removal, resume, length = max(found, key=lambda entry: (entry[0], -entry[1].end, entry[1].start))
    return removal, resume, length


def _places(have: Ids, rest: Ids, start: int, anchor: int) -> list[int]:
    """Where in `have[start:]` the next ids of the request occur; bounded, from the left. The last few are always looked at."""
    places: list[int] = []
    if len(rest) >= anchor:
        haystack, needle = have[start:].tobytes(), rest[:anchor].tobytes()
        size = have.itemsize
        found = haystack.find(needle)
        while found >= 0 and len(places) < MAX_CANDIDATES:
            if found % size == 0:
                places.append(start + found // size)
            found = haystack.find(needle, found + 1)
    return places + [place for place in range(max(start, len(have) - anchor + 1), len(have)) if place not in places]


def _begin_at_message(have: Ids, removal: Removal, floor: int, starts: Set[int]) -> Removal:
    """The same removal, moved to the left to the beginning of a message where the ids allow it."""
    if removal.replaced or not starts:
        return removal
    start, end = removal.start, removal.end
    while int(have[start]) not in starts:
        if start <= floor or have[start - 1] != have[end - 1]:
            return removal
        start, end = start - 1, end - 1
    return Removal(start, end)
