"""Live contexts: what a model has read, from which spans can be taken out again, and everything that happens to it later.

Knows: models, caches, the ledger, erasing methods; and, in files of their own, text, chat messages and session files. Does not
know about tasks, servers or engines.

    token_context   state, erasing, restoring, repairing, running: a context of ids, one file for each thing it can do
    erasable        what people have instead of ids, on top of it: text.py, chat.py, session_file.py
"""

from __future__ import annotations

from kveraser.context.erasable import ErasableContext
from kveraser.context.repairing import RepairProgress
from kveraser.context.restoring import RestoreReport
from kveraser.context.state import PURGED, ContextState, EditRecord
from kveraser.context.token_context import TokenContext

__all__ = [
    "PURGED",
    "ContextState",
    "EditRecord",
    "ErasableContext",
    "RepairProgress",
    "RestoreReport",
    "TokenContext",
]
