"""Making steered conversations exact while there is nothing else to do.

Knows: the store, how a held context becomes exact. Does not know about requests; it is called between them.
"""

from __future__ import annotations

import logging

from kveraser.serving.contexts.held import HeldContext
from kveraser.serving.contexts.store import ContextStore

log = logging.getLogger("kveraser.serving")


class IdleRepair:
    """Repairs the contexts of a store a little at a time."""

    def __init__(self, store: ContextStore) -> None:
        self.store = store

    def step(self) -> bool:
        """Make one conversation a little more exact; whether there is more to do."""
        held = self.store.to_repair()
        if held is None:
            return False
        try:
            self._repair(held)
        except Exception as error:  # it stays approximate, and says so
            log.error("a conversation could not be repaired: %s", type(error).__name__)
            held.repair = False
        return True

    def _repair(self, held: HeldContext) -> None:
        if held.bytes > self.store.budget:  # no room for an exact copy beside it
            held.repair = False
            return
        self.store.make_room(keep=held)
        held.context.repair(max_chunks=1)
