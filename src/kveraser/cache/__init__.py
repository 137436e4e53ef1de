"""Caches whose slots can be edited in place, and what that takes of transformers' caches.

`backend` is what methods and contexts act on, `transformers` that over a transformers cache. For it, `support` says what can be
edited, `growable` is a cache layer that grows without copies, `surgery` reads and writes slots, `deleting` moves them, `passes` runs
tokens again inside their slots, `repair` as if others had never been there, `closing` runs new ones as if these had left no gap, `rows`
one for each of several caches; `stand_in` is in the cache's place while they run. `marks` is what an edited cache remembers of itself,
`tokens` what a pass must know of the tokens in it.

Knows: transformers' caches and forwards, slots. Does not know about erasing methods, undoing, text, or who has read what.
"""

from kveraser.cache.backend import Backend, Can, Eraser, Kept
from kveraser.cache.closing import closing_gaps
from kveraser.cache.growable import GrowableLayer, growable_cache
from kveraser.cache.marks import EditMark, Marks, Steered, get_marks, set_marks
from kveraser.cache.passes import (
    PREFILL_CHUNK,
    Rewrite,
    Window,
    extend,
    look,
    prefill_chunk,
    recompute,
    rewrite_range,
    rewrite_runs,
    window_spans,
)
from kveraser.cache.repair import Repair, can_close_gaps, repair_slots
from kveraser.cache.rows import extend_rows
from kveraser.cache.stand_in import StandInLayer, additive
from kveraser.cache.support import check_cache, check_editable, check_model, writing
from kveraser.cache.surgery import (
    States,
    append,
    cache_length,
    cut,
    read,
    snapshot,
    snapshots,
    state_bytes,
    truncate,
    write,
    write_all,
)
from kveraser.cache.tokens import Tokens, count_positions, slots_of, whole_numbers
from kveraser.cache.transformers import TransformersBackend

__all__ = [
    "PREFILL_CHUNK",
    "Backend",
    "Can",
    "EditMark",
    "Eraser",
    "GrowableLayer",
    "Kept",
    "Marks",
    "Repair",
    "Rewrite",
    "StandInLayer",
    "States",
    "Steered",
    "Tokens",
    "TransformersBackend",
    "Window",
    "additive",
    "append",
    "cache_length",
    "can_close_gaps",
    "check_cache",
    "check_editable",
    "check_model",
    "closing_gaps",
    "count_positions",
    "cut",
    "extend",
    "extend_rows",
    "get_marks",
    "growable_cache",
    "look",
    "prefill_chunk",
    "read",
    "recompute",
    "repair_slots",
    "rewrite_range",
    "rewrite_runs",
    "set_marks",
    "slots_of",
    "snapshot",
    "snapshots",
    "state_bytes",
    "truncate",
    "whole_numbers",
    "window_spans",
    "write",
    "write_all",
    "writing",
]
