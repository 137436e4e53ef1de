"""Delete-and-shift: drop the span's slots and move the suffix up, turning its keys back to their new positions.

No token is run through the model, but for its first keys. The suffix still carries what it saw of the span in its own states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kveraser.cache import PREFILL_CHUNK, Tokens, cut, look, read, state_bytes
from kveraser.methods.base import Edit, EraseMethod, Outcome, Plan
from kveraser.model.rope import frequencies, rotary_layout, rotate
from kveraser.model.view import causal_lm
from kveraser.spans import Span, gaps


def delete_spans(edit: Edit) -> tuple[Tokens, int]:
    """Cut the edit's spans out of its cache and re-rotate the keys behind them.

    Returns:
        The tokens that are left, and the bytes of keys and values that were moved.
    """
    tokens = edit.tokens.without(edit.spans)
    first = edit.spans[0].start
    layout, inv_freq = rotary_layout(edit.model), frequencies(edit.model)
    before = edit.tokens.position(Span(0, edit.length))
    before = Tokens(before.expand(edit.tokens.ids.shape)).without(edit.spans).ids
    suffix = Span(first, tokens.length)
    delta = tokens.position(suffix) - before[:, suffix.slice]
    if bool((delta == delta[:1, :1]).all()):
        delta = delta[0, 0]
    cut(edit.cache, edit.spans)
    for rotary, layer in zip(layout.rotary, edit.cache.layers, strict=True):
        if rotary:
            layer.keys[:, :, suffix.slice] = rotate(layer.keys[:, :, suffix.slice], delta, inv_freq, layout.pairing)
    remake_layer_0(edit, tokens, suffix)
    return tokens, state_bytes(read(edit.cache, suffix))


def remake_layer_0(edit: Edit, tokens: Tokens, suffix: Span) -> None:
    """Compute layer 0's keys of live tokens anew where they are now.

    They depend on token and position alone. A rounded key that was rotated and rounded again is not what the model would
    compute, which wrecks models with large key biases in layer 0 (Qwen2.5: 354); the other layers' are much smaller. Steered
    slots have ids that stand in for others, so their keys stay as they were moved.
    """
    steered = tuple(span for span in edit.marks.cut(edit.spans).steered_spans if span.end > suffix.start)
    layer = edit.cache.layers[0]
    for run in gaps(steered, suffix.end, suffix.start):
        for start in range(run.start, run.end, PREFILL_CHUNK):
            part = Span(start, min(start + PREFILL_CHUNK, run.end))
            layer.keys[:, :, part.slice] = look(edit.model, edit.cache, tokens, part, 0)[0]


def check_movable(edit: Edit) -> None:
    """Raise `UnsupportedCacheError` unless the model's keys can be moved."""
    frequencies(causal_lm(edit.model))
    rotary_layout(edit.model)


@dataclass(frozen=True)
class DeleteAndShift(EraseMethod):
    """Remove the span's keys and values and close the gap. The approximate baseline of the paper (arXiv 2606.17034)."""

    name: ClassVar[str] = "delete-and-shift"
    summary: ClassVar[str] = "drop the span's states, re-rotate the suffix keys"
    moves_keys: ClassVar[bool] = True

    def plan(self, edit: Edit) -> Plan:
        check_movable(edit)
        return Plan(edit.spans[0].start)

    def apply(self, edit: Edit, plan: Plan) -> Outcome:
        _, written = delete_spans(edit)
        marks = edit.marks.cut(edit.spans).contaminated(edit.spans[0].start)
        return Outcome(marks, removed=edit.spans, bytes_written=written)
