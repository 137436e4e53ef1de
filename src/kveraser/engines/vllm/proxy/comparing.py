"""What of a conversation a request can use here: what is left of it when some runs are taken out, then new ids; and which of several saves
it the most.

Knows: the matching of `kveraser serve`, integers. Does not know about conversations, servers or sessions.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kveraser.readers import readers_for
from kveraser.serving.contexts.blocks import common_length
from kveraser.serving.contexts.matching import match
from kveraser.spans import Span

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Use:
    """How a request uses a conversation.

    Attributes:
        removals: ids `[start, end)` of the conversation that are taken out, in order; something is kept behind each of them.
        kept_until: ids of the conversation from here on are not used.
        new_from: ids of the request from here on are new.
    """

    removals: tuple[tuple[int, int], ...]
    kept_until: int
    new_from: int

    @property
    def prefix(self) -> int:
        """Ids that the two share from the beginning."""
        return self.removals[0][0] if self.removals else self.kept_until

    @property
    def gain(self) -> int:
        """Ids that need not be read, less those that have to be run to take the removals out."""
        return self.new_from - sum(end - start for start, end in self.removals)

    @property
    def readers(self) -> int:
        """Tokens that are run besides, where readers of the removals go by their length."""
        return sum(readers_for(Span(start, end) for start, end in self.removals))


def compare(cached: Sequence[int] | Ids, wanted: Sequence[int] | Ids, starts: Set[int] = frozenset()) -> Use:
    """The use of a conversation that saves the most; it ends where something else stands in the place of what was there.

    Args:
        starts: ids that begin a message; where a run may as well begin at one of them, it does.
    """
    found = match(cached, wanted, starts=starts)
    removals: list[tuple[int, int]] = []
    for change in found.changes:
        if change.added:
            return Use(tuple(removals), change.start, change.new_start)
        removals.append((change.start, change.end))
    return Use(tuple(removals), found.kept_until, found.new_from)


def unedited(cached: Ids, wanted: Ids) -> Use:
    """The use of a conversation of which nothing is taken out."""
    prefix = common_length(cached, wanted)
    return Use((), prefix, prefix)


def best_use(
    cached: Sequence[Ids], wanted: Ids, *, edit: bool, starts: Set[int] = frozenset()
) -> tuple[int, Use] | None:
    """Which of some conversations, the latest first, saves a request the most, and its use; None where none saves anything.

    Args:
        edit: whether something may be taken out; otherwise only what the two share from the beginning counts.
        starts: as of `compare`.
    """
    best: tuple[int, Use] | None = None
    most = 0
    for number, ids in enumerate(cached):
        if len(ids) <= most:
            continue
        found = compare(ids, wanted, starts) if edit else unedited(ids, wanted)
        if found.gain > most:
            best, most = (number, found), found.gain
        if found.new_from == len(ids) and 2 * most >= len(wanted):  # goes on with all of it: the rule
            break
    return best
