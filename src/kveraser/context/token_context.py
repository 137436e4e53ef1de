"""A live context of token ids: a cache, the ledger of what was appended, and what was erased from it.

Knows: models, caches, ledger spans, erasing methods. Does not know about text, chat or files (`erasable.py` adds those).

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
        model: a causal language model, used and left as it is.
        eraser: for `kveraser` and `auto`; None takes the one that ships for the model, if any.

    Raises:
        UnsupportedCacheError: a model whose cache cannot be edited.
        EraserMismatchError: an eraser of another model.
    """
