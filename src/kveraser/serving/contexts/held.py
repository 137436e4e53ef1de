"""One context as the server holds it in memory.

Knows: `ErasableContext`, its owner, its view. Does not know about HTTP, queues, files, requests or other contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kveraser.cache import GrowableLayer, get_marks
from kveraser.context import ErasableContext
from kveraser.methods import EraseReceipt, Undo
from kveraser.serving.contexts.view import View


@dataclass
class HeldContext:
    """A context in memory.

    Attributes:
        id: names it, also on disk.
        owner: digest of the API key it belongs to.
        is_session: made through the session API; else a cached conversation.
        context: the context itself.
        prompt_end: length of the view before the last prompt's last token was read: what follows may be dropped, since a
            client that asks again gets a new reply.
        repair: whether to make it exact in idle time.
        residual: of the edits that it is approximate by, the largest of any; None where that of one is not known.
        receipts: of a session's erases, by id, the oldest first: the states that undo them live in their receipts.
        has_copy: whether there is an exact copy in the making, of a repair that was begun.
        reserved: bytes that it may take while a reply is made in it; 0 where none is.
    """

    id: str
    owner: str
    is_session: bool
    context: ErasableContext
    prompt_end: int = 0
    repair: bool = False
    residual: float | None = 0.0
    receipts: dict[str, EraseReceipt] = field(default_factory=dict)
    has_copy: bool = False
    reserved: int = 0
    _view: tuple[tuple[Any, ...], View] | None = field(default=None, repr=False)

    @property
    def exact(self) -> bool:
        """Whether the context equals a fresh prefill of its view."""
        return self.context.exact

    @property
    def busy(self) -> bool:
        """Whether a reply is being made in it: it may be copied from, but neither edited nor let go of."""
        return self.reserved > 0

    @property
    def bytes(self) -> int:
        """Memory taken by keys and values: room to spare, the exact copy of a repair, and what undoes erases included."""
        copies = 2 if (self.repair or self.has_copy) and not self.exact else 1
        return context_bytes(self.context) * copies + sum(undo.nbytes for undo in self._undos().values())

    def drop_oldest_undo(self) -> int | None:
        """Free the states that undo the oldest erase, which can then be undone by recomputing; their bytes, None where there are none."""
        oldest = next(iter(self._undos().items()), None)
        if oldest is None:
            return None
        name, undo = oldest
        freed = undo.nbytes
        undo.clear()
        del self.receipts[name]
        return freed

    def _undos(self) -> dict[str, Undo]:
        return {name: receipt.undo for name, receipt in self.receipts.items() if receipt.undo is not None}

    @property
    def view(self) -> View:
        """The ids as a client would send them; made anew only after a change.

        A ledger only grows, so which context it is, its length and what is erased tell two states of it apart.
        """
        now = (self.context, len(self.context), self.context.erased)
        if self._view is None or self._view[0] != now:
            self._view = now, View.of(self.context)
        return self._view[1]

    @property
    def exact_until(self) -> int:
        """How many ids of the view, from the beginning, equal a fresh prefill."""
        known = get_marks(self.context.cache).approximate_from
        return len(self.view) if known is None else min(len(self.view), known)


def context_bytes(context: ErasableContext) -> int:
    """Memory of a context's keys and values, room to spare included."""
    total = 0
    for layer in context.cache.layers:
        assert isinstance(layer, GrowableLayer)
        if layer.keys is not None:
            batch, heads, _, size = layer.keys.shape
            total += 2 * batch * heads * size * layer.capacity * layer.keys.element_size()
    return total
