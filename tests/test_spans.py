"""Spans and the ledger."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from kveraser.spans import Erased, Placed, Span, SpanLedger, gaps, merge_spans, remap, union_spans


@pytest.mark.parametrize(
    ("start", "end", "word"),
    [
        (3, 3, "empty"),
        (5, 2, "reversed"),
        (-1, 4, "before position 0"),
        (1.5, 2, "two integers"),
        ("a", 2, "two integers"),
    ],
)
def test_a_span_that_makes_no_sense_is_refused_with_its_values(start, end, word):
    with pytest.raises(kv.SpanError, match=word) as caught:
        Span(start, end)
    assert str(start) in str(caught.value)


def test_spans_are_values():
    assert Span(2, 5) == Span(2, 5)
    assert len({Span(2, 5), Span(2, 5)}) == 1
    assert list(Span(2, 5)) == [2, 3, 4]
    assert 4 in Span(2, 5)
    assert 5 not in Span(2, 5)
    assert str(Span(2, 5)) == "[2, 5)"


def test_adjacent_spans_are_joined_and_sorted():
    assert merge_spans([Span(8, 9), Span(2, 4), Span(4, 6)], 10) == (Span(2, 6), Span(8, 9))


@pytest.mark.parametrize(
    ("spans", "word"),
    [([], "no span"), ([Span(2, 11)], "10 tokens"), ([Span(1, 4), Span(3, 5)], "overlap")],
)
def test_spans_that_do_not_fit_together_are_refused(spans, word):
    with pytest.raises(kv.SpanError, match=word):
        merge_spans(spans, 10)


cuts = (
    st.lists(st.integers(0, 40), min_size=0, max_size=8, unique=True)
    .map(sorted)
    .map(lambda edges: [Span(a, b) for a, b in zip(edges[::2], edges[1::2], strict=False)])
)


@given(cuts, st.integers(0, 10))
def test_gaps_are_what_spans_leave(spans, start):
    covered = {p for span in spans for p in span}
    assert [p for gap in gaps(spans, 40, start) for p in gap] == [p for p in range(start, 40) if p not in covered]


@given(cuts, st.integers(0, 35), st.integers(1, 4))
def test_remap_counts_what_was_cut_out_before(spans, start, size):
    span = Span(start, start + size)
    if any(span.overlaps(cut) for cut in spans):
        return
    kept = [p for p in range(60) if not any(p in cut for cut in spans)]
    assert remap(span, spans).start == kept.index(start)


class Model:
    """What a ledger should be: a list of flags."""

    def __init__(self, length):
        self.state = ["live"] * length

    def slots(self):
        return [p for p, state in enumerate(self.state) if state != "removed"]


@given(
    st.integers(5, 40),
    st.lists(st.tuples(st.integers(0, 39), st.integers(1, 6), st.booleans(), st.integers(0, 3)), max_size=12),
)
def test_a_ledger_translates_positions_as_a_plain_list_would(length, operations):
    ledger, model = SpanLedger(length), Model(length)
    for start, size, in_cache, what in operations:
        if what == 0:
            assert ledger.append(size) == Span(len(model.state), len(model.state) + size)
            model.state += ["live"] * size
            continue
        if what == 1 and ledger.erased:
            entry = ledger.erased[start % len(ledger.erased)]
            ledger.unmark(entry.span)
            model.state[entry.span.slice] = ["live"] * len(entry.span)
        elif start + size <= ledger.length:
            span = Span(start, start + size)
            if all(state == "live" for state in model.state[span.slice]):
                ledger.check_live(span)
                ledger.mark(span, in_cache=in_cache)
                model.state[span.slice] = ["steered" if in_cache else "removed"] * size
            else:
                with pytest.raises(kv.SpanError, match="erased already"):
                    ledger.check_live(span)
        assert ledger.cache_length == len(model.slots())
        for slot, position in enumerate(model.slots()):
            assert ledger.to_cache(position) == slot
        live = [p for p, state in enumerate(model.state) if state == "live"]
        assert [p for run in ledger.live() for p in run] == live


def test_dropping_slots_tells_which_erased_spans_lost_theirs():
    ledger = SpanLedger(20)
    ledger.mark(Span(2, 4), in_cache=False)
    ledger.mark(Span(8, 10), in_cache=True)
    ledger.mark(Span(14, 15), in_cache=True)
    assert ledger.drop_slots([Span(6, 8)]) == (Span(8, 10),)
    assert ledger.cache_length == 16


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 9)), max_size=8))
def test_a_union_has_every_position_once_and_in_order(bounds):
    spans = [Span(start, start + size) for start, size in bounds]
    joined = union_spans(spans)
    assert [position for span in joined for position in span] == sorted({p for span in spans for p in span})
    assert all(left.end < right.start for left, right in pairwise(joined))


def standing(ledger, span, place):
    """What stands where a span stood, as it is defined: by what stands where the text that replaced it stood."""
    inside = [entry.span for entry in ledger.placed if entry.before in span]
    if not inside:
        return (span,)
    found = [*ledger.live(span), *(run for new in inside for run in standing(ledger, new, place))]
    return tuple(sorted(found, key=lambda run: place[run.start]))


@given(
    st.integers(4, 20),
    st.lists(
        st.tuples(st.integers(0, 60), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans()), max_size=8
    ),
)
def test_a_ledger_with_replaced_spans_is_in_the_order_of_the_cache(length, operations):
    """A plain list of `[position, slot?, live?]` in the order of the cache says what is right."""
    ledger, plain = SpanLedger(length), [[position, True, True] for position in range(length)]
    undo, parts = [], []
    for start, size, new, stays, back in operations:
        if back and undo:
            ledger, plain = undo.pop()
            continue
        span = Span(start, start + size)
        inside = [entry for entry in plain if entry[0] in span and entry[2]]
        if start + size > ledger.length or len(inside) < size:
            continue
        for part in ledger.parts(span):
            run = [entry for entry in plain if entry[0] in part]
            at = plain.index(run[0])
            assert plain[at : at + len(part)] == run
        part = ledger.parts(span)[0]
        undo.append((ledger.copy(), [list(entry) for entry in plain]))
        taken = min(new, len(part)) if stays else 0
        at = next(index for index, entry in enumerate(plain) if entry[0] == part.start)
        for offset in range(len(part)):
            plain[at + offset] = [part.start + offset, stays and offset >= taken, False]
        ledger.mark(part, in_cache=stays and taken < len(part), taken=taken)
        placed = ledger.append(new)
        ledger.place(placed, part.start)
        plain[at:at] = [[position, True, True] for position in placed]
        assert ledger.standing(part) == (placed,)
        slots = [entry for entry in plain if entry[1]]
        assert ledger.cache_length == len(slots)
        assert [p for run in ledger.live() for p in run] == [p for p, _, live in plain if live]
        assert [p for run in ledger.from_cache(Span(0, len(slots))) for p in run] == [p for p, _, _ in slots]
        for slot, (position, _, live) in enumerate(slots):
            assert not live or ledger.to_cache(position) == slot
        parts.append(part)
        place = {position: index for index, (position, _, _) in enumerate(plain)}
        for known in parts:
            if known.end <= ledger.length:
                assert ledger.standing(known) == standing(ledger, known, place)
        cuts = [Span(start, start + 1), Span(start + 2, start + 2 + size)]
        first = {entry.span: next(s for s, (p, _, _) in enumerate(slots) if p in entry.span) for entry in ledger.erased
                 if entry.in_cache}  # fmt: skip
        dropped = tuple(span for span, slot in first.items() if any(slot in cut for cut in cuts))
        left = ledger.copy()
        assert left.drop_slots(cuts) == dropped
        assert {entry.span for entry in left.erased if entry.in_cache} == first.keys() - set(dropped)
        assert left.drop_slots(()) == ()


@pytest.mark.parametrize("stays", [False, True])
def test_what_stands_where_something_stood_is_told_after_thousands_of_replacements(stays):
    count = 2000
    erased, placed = [], []
    for number in range(count):  # of six tokens by five, then of those by five others, and so on
        old = Span(20, 26) if not number else placed[-1].span
        erased.append(Erased(old, stays and not number, 5 if stays and not number else 0))
        placed.append(Placed(Span(46 + 5 * number, 51 + 5 * number), old.start))
    ledger = SpanLedger(46 + 5 * count, erased, placed)
    last = placed[-1].span
    assert ledger.standing(Span(20, 26)) == ledger.standing(placed[count // 2].span) == (last,)
    assert ledger.live() == (Span(0, 20), last, Span(26, 46))
    assert ledger.span_to_cache(last) == Span(20, 25)
    assert ledger.to_cache(26) == 25 + stays
    assert ledger.cache_length == 45 + stays


def test_what_was_put_in_and_withdrawn_leaves_the_order_as_it_was():
    ledger = SpanLedger(10)
    ledger.mark(Span(3, 6), in_cache=True, taken=2)
    ledger.place(ledger.append(2), 3)
    assert ledger.live() == (Span(0, 3), Span(10, 12), Span(6, 10))
    ledger.append(4)
    ledger.unmark(Span(3, 6))
    ledger.withdraw(Span(10, 12))
    assert ledger.live() == (Span(0, 10), Span(12, 16))
    assert ledger.to_cache(12) == 10
