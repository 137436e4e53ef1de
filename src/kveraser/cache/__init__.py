"""Surgery on transformers caches, in place.

`support` says what can be edited, `growable` is a cache layer that grows without copies, `surgery` reads and writes
slots, `passes` runs tokens again inside their slots, `marks` is what an edited cache remembers of itself.
"""

from kveraser.cache.growable import GrowableLayer, growable_cache
from kveraser.cache.marks import EditMark, Marks, Steered, get_marks, set_marks
from kveraser.cache.passes import (
    PREFILL_CHUNK,
    Rewrite,
    Tokens,
    Window,
    count_positions,
    extend,
    look,
    recompute,
    rewrite_range,
    rewrite_runs,
    rewrite_slots,
    window_spans,
)
from kveraser.cache.support import check_cache, check_editable, check_model, writing
from kveraser.cache.surgery import (
    States,
    append,
    cache_length,
    cut,
    read,
    snapshot,
    state_bytes,
    truncate,
    write,
)

__all__ = [
    "PREFILL_CHUNK",
    "EditMark",
    "GrowableLayer",
    "Marks",
    "Rewrite",
    "States",
    "Steered",
    "Tokens",
    "Window",
    "append",
    "cache_length",
    "check_cache",
    "check_editable",
    "check_model",
    "count_positions",
    "cut",
    "extend",
    "get_marks",
    "growable_cache",
    "look",
    "read",
    "recompute",
    "rewrite_range",
    "rewrite_runs",
    "rewrite_slots",
    "set_marks",
    "snapshot",
    "state_bytes",
    "truncate",
    "window_spans",
    "write",
    "writing",
]
