"""Live contexts: what a model has read, from which spans can be taken out again, and everything that happens to it later.

Knows: backends, the ledger, erasing methods; and, in files of their own, text, chat messages and session files. Does not
know about tasks, servers or engines.

    token_context   state, erasing, restoring, repairing, running: a context of ids, one file for each thing it can do
    live            what people have instead of ids, on top of it: text.py, chat.py, messages.py and talking.py, session.py;
                    its files: session_folder.py, session_v1.py
    decoding        the one decoder: from logits to the next token, and on
    backend         what both ask of a cache and the model that fills it
    erasable        all that over transformers (transformers.py); engines have theirs
    together        the next token of several of them at once
"""

from __future__ import annotations

from kveraser.context.backend import Keep, LiveBackend, Run
from kveraser.context.decoding import GREEDY, Decoder, Drawing, Step, Watch, steps
from kveraser.context.erasable import ErasableContext
from kveraser.context.live import LiveContext
from kveraser.context.repairing import RepairProgress
from kveraser.context.restoring import RestoreReport
from kveraser.context.state import PURGED, ContextState, EditRecord
from kveraser.context.text import says_a_line
from kveraser.context.together import advance_together
from kveraser.context.token_context import TokenContext
from kveraser.context.transformers import LiveTransformers

__all__ = [
    "GREEDY",
    "PURGED",
    "ContextState",
    "Decoder",
    "Drawing",
    "EditRecord",
    "ErasableContext",
    "Keep",
    "LiveBackend",
    "LiveContext",
    "LiveTransformers",
    "RepairProgress",
    "RestoreReport",
    "Run",
    "Step",
    "TokenContext",
    "Watch",
    "advance_together",
    "says_a_line",
    "steps",
]
