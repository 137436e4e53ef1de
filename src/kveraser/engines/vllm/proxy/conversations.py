"""What has been read of each conversation, by token ids, and which of them a request goes on with.

Knows: ids, owners, how much may be remembered; compares in threads. Does not know about servers or HTTP, nor how something is erased: of a session it
only holds the object.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from kveraser.engines.vllm.client import VLLMSession
from kveraser.engines.vllm.proxy.comparing import Ids, Use, best_use
from kveraser.serving.beside import Beside
from kveraser.serving.contexts.view import View

LOOK = 256
"""Conversations of one owner, the latest ones, that a request is compared with."""
_TIMES = 3  # that they are compared, where what is found has changed meanwhile
Owner = tuple[str, str]
"""Whose a conversation is: the digest of the API key, and the model."""


def fresh_view(ids: Ids) -> View:
    """The view of a context in which each id is where it was put first."""
    return View(ids, np.arange(len(ids)))


@dataclass(eq=False)
class Conversation:
    """One conversation.

    Attributes:
        view: its ids as the client sent them last, and where they are in the session's ledger.
        replica: the number of the server that has read it.
        session: where its edited context lives; None while it is exact.
        busy: requests that are being answered from it.
        changing: whether something is being taken out of its edited context.
        prefilled: ids that the server has read exactly meanwhile, in the background.
    """

    owner: Owner
    view: View
    replica: int
    session: VLLMSession | None = None
    busy: int = 0
    changing: bool = False
    prefilled: Ids | None = None

    def goes_on(self, found: Use, starts: Set[int]) -> bool:
        """Whether a request goes on with this very conversation: of its end it leaves out no more than what the template had put there
        for the reply to begin with. Another one that only begins in the same way must get nothing of its edits.

        Args:
            starts: ids that begin a message.
        """
        if found.kept_until == len(self.view):
            return True
        begun = np.flatnonzero(np.isin(self.view.ids, list(starts)))
        return bool(len(begun) and found.kept_until >= begun[-1])

    @property
    def is_prefilled(self) -> bool:
        """Whether what the server has read exactly begins the conversation as it is now."""
        done = self.prefilled
        return done is not None and len(done) <= len(self.view) and bool((self.view.ids[: len(done)] == done).all())


class Conversations:
    """The conversations that are remembered.

    Args:
        limit: so many at most.
        tokens: so many ids at most, all together.
        forget: called with a conversation that has to go. The owner who takes the most loses the oldest that is not in use.
    """

    def __init__(self, limit: int, tokens: int, forget: Callable[[Conversation], None]) -> None:
        self.limit, self.tokens, self._forget = limit, tokens, forget
        self._of: dict[Owner, OrderedDict[int, Conversation]] = {}
        self._sizes: dict[int, int] = {}
        self._beside = Beside(None, name="kveraser-comparing")

    def __iter__(self) -> Iterator[Conversation]:
        return (entry for mine in self._of.values() for entry in mine.values())

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, entry: object) -> bool:
        return id(entry) in self._sizes

    @property
    def size(self) -> int:
        """Ids that are remembered."""
        return sum(self._sizes.values())

    async def find(
        self, owner: Owner, wanted: Ids, *, edit: bool, starts: Set[int] = frozenset()
    ) -> tuple[Conversation, Use] | None:
        """The owner's conversation that saves a request the most, and what of it can be used as it is now.

        They are compared beside the event loop, as they are when that begins. Where the one that is found has changed, or has gone, they are
        compared again; one that changes every time is not found.

        Args:
            edit, starts: as of `best_use`.
        """
        for _ in range(_TIMES):
            latest = islice(reversed(self._of.get(owner, OrderedDict()).values()), LOOK)
            seen = [(entry, entry.view) for entry in latest if edit or entry.session is None]
            ids = [view.ids for _, view in seen]
            best = await self._beside.run(partial(best_use, ids, wanted, edit=edit, starts=starts)) if seen else None
            if best is None:
                return None
            (entry, view), use = seen[best[0]], best[1]
            if entry in self and entry.view is view:
                return entry, use
        return None

    def put(self, entry: Conversation) -> None:
        """Remember a conversation as it is now; it is the latest one."""
        mine = self._of.setdefault(entry.owner, OrderedDict())
        mine[id(entry)] = entry
        mine.move_to_end(id(entry))
        self._sizes[id(entry)] = len(entry.view)
        while len(self) > self.limit or self.size > self.tokens:
            oldest = self._oldest()
            if oldest is None:
                break
            self.remove(oldest)
            self._forget(oldest)

    def remove(self, entry: Conversation) -> None:
        """Remember it no more."""
        if self._sizes.pop(id(entry), None) is not None:
            mine = self._of[entry.owner]
            del mine[id(entry)]
            if not mine:
                del self._of[entry.owner]

    def stop(self) -> None:
        """Compare nothing more."""
        self._beside.stop()

    def _oldest(self) -> Conversation | None:
        taken = {owner: sum(self._sizes[key] for key in mine) for owner, mine in self._of.items()}
        for owner in sorted(taken, key=lambda owner: -taken[owner]):
            for entry in self._of[owner].values():
                if not entry.busy:
                    return entry
        return None
