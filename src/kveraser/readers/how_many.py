"""How many readers of a span to recompute where nobody says a number.

A longer span is read by more tokens. Knows: lengths of spans. Does not know who has read them (`docs/log.md`: readers by the
length of the span).
"""

from __future__ import annotations

from collections.abc import Iterable

from kveraser.spans import Span

LEAST_READERS = 70
"""Of a span, at least: 63 readers and 7 more (`choice`; `docs/log.md`: the curve of quality over cost)."""
READERS_PER_TOKEN = 2
"""For each erased token, where that is more."""
HOW_MANY = f"{LEAST_READERS}, or {READERS_PER_TOKEN} for each erased token if that is more"
"""The same in words; with other numbers it is not the same default any more."""


def readers_for(spans: Iterable[Span], number: int | None = None) -> tuple[int, ...]:
    """How many tokens to recompute for each of some spans; `number` of them where somebody says one."""
    return tuple(max(LEAST_READERS, READERS_PER_TOKEN * len(span)) if number is None else number for span in spans)
