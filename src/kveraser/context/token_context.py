"""A live context of token ids: a backend, the ledger of what was appended, and what was erased from it.

Knows: backends, ledger spans, erasing methods. Does not know about text, chat or files (`live.py` adds those), or engines.

Every token that is appended keeps its ledger position for ever. Where its states are in the cache is looked up when
needed, so a method that moves the suffix does not make older spans stale.
"""

from __future__ import annotations

from kveraser.context.erasing import Erasing
from kveraser.context.repairing import Repairing
from kveraser.context.restoring import Restoring
from kveraser.context.running import Running


class TokenContext(Erasing, Restoring, Repairing, Running):
    """A context of token ids whose spans can be erased, restored, repaired and purged. One row; thread-safe.

    Args:
        backend: an empty one.
        eraser: for the methods that need one; None takes the one that the backend finds for its model.

    Raises:
        EraserMismatchError: an eraser of another model.
    """
