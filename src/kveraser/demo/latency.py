"""How the cost of an erase grows with what follows the span.

Knows: contexts and methods. Does not know about tables; a quick look for the demo, `benchmarks/` measures properly.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from kveraser.demo.stories import pages
from kveraser.evaluation.compare import Context
from kveraser.methods import EraseMethod

PREFIX, SPAN = 256, 64
SUFFIXES = (256, 1024, 4096)


def measure_latency(
    context: Context, methods: Sequence[EraseMethod], *, done: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Milliseconds per method and suffix length, from one growing context; medians of three for the quick methods.

    Args:
        context: a new one, with room for all of it.
        methods: to be timed.
        done: called with the method's name after each.
    """
    text = context.encode("\n\n".join(pages()))
    ids = (text * (1 + (PREFIX + SPAN + SUFFIXES[-1]) // len(text)))[: PREFIX + SPAN + SUFFIXES[-1]]
    context.append(ids[:PREFIX])
    span = context.append(ids[PREFIX : PREFIX + SPAN])
    rows: list[dict[str, Any]] = []
    at = PREFIX + SPAN
    for suffix in SUFFIXES:
        context.append(ids[at : PREFIX + SPAN + suffix])
        at = PREFIX + SPAN + suffix
        for method in methods:
            times = []
            for _ in range(1 if method.exact and suffix > 512 else 3):
                receipt = context.erase(span, method)
                times.append(1000 * receipt.seconds)
                context.restore(receipt)
            rows.append({"method": method.name, "suffix": suffix, "milliseconds": statistics.median(times)})
            if done:
                done(method.name)
    return rows
