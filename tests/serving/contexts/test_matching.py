"""Alignment of request ids with cached ids, against a brute-force reference."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kveraser.serving.contexts.matching import Match, Removal, match
from kveraser.serving.contexts.reuse import before

ids = st.lists(st.integers(0, 3), max_size=14)


def rebuilt(cached, found, placeholder=()):
    """What the request's first ids must be, if the match is right."""
    out, at = [], 0
    for removal in found.removals:
        out += list(cached[at : removal.start])
        out += list(placeholder) if removal.replaced else []
        at = removal.end
    return out + list(cached[at : found.kept_until])


def best_single(cached, wanted, placeholder=()):
    """The largest gain with at most one run taken out, by trying all of them."""

    def equal(a, b):
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    prefix = equal(cached, wanted)
    best = prefix
    for start in range(prefix + 1):
        for end in range(start + 1, len(cached)):
            for filler in {(), tuple(placeholder)}:
                if tuple(wanted[start : start + len(filler)]) == filler:
                    kept = equal(cached[end:], wanted[start + len(filler) :])
                    if kept:
                        best = max(best, start + kept - (end - start))
    return best


@given(ids, ids, st.lists(st.integers(0, 3), max_size=2))
def test_a_match_gives_back_the_request_id_by_id(cached, wanted, placeholder):
    found = match(cached, wanted, placeholder=placeholder, starts={0}, anchor=2)
    assert rebuilt(cached, found, placeholder) == wanted[: found.new_from]
    ends = [0]
    for removal in found.removals:
        assert ends[-1] <= removal.start < removal.end < found.kept_until
        ends.append(removal.end)


@given(ids, ids, st.lists(st.integers(0, 3), max_size=2))
def test_one_removal_saves_as_much_as_the_best_of_all(cached, wanted, placeholder):
    found = match(cached, wanted, placeholder=placeholder, max_removals=1, anchor=1)
    assert found.gain == best_single(cached, wanted, placeholder)


@given(st.lists(st.lists(st.integers(1, 500), min_size=9, max_size=20, unique=True), min_size=2, max_size=8), st.data())
def test_dropped_messages_are_found_whole(contents, data):
    messages = [[0, 600 + index, *content] for index, content in enumerate(contents)]
    dropped = data.draw(st.sets(st.integers(0, len(messages) - 2), max_size=3))
    cached = [token for message in messages for token in message]
    wanted = [token for index, message in enumerate(messages) if index not in dropped for token in message]
    found = match(cached, [*wanted, 999], starts={0}, anchor=4)
    gone = sum(len(messages[index]) for index in dropped)
    assert found.gain >= len(cached) - 2 * gone
    if found.kept_until == len(cached) and found.removed == gone:
        assert found.new_from == len(wanted)
        assert all(cached[removal.start] == 0 for removal in found.removals)


def test_of_two_messages_alike_in_their_beginning_the_whole_one_is_taken_out():
    first, second, third = [0, 7, 1, 2, 3, 9], [0, 7, 4, 5, 6, 9], [0, 8, 1, 1, 1, 9, 5, 5, 5]
    found = match([*first, *second, *third], [*first, *third, 4], starts={0}, anchor=3)
    assert found == Match((Removal(6, 12),), 21, 15)
    assert match([*first, *second, *third], [*second, *third], starts={0}, anchor=3).removals == (Removal(0, 6),)


def test_a_placeholder_stands_for_what_was_taken_out():
    cached = [*range(100, 120), *range(200, 230), *range(300, 320)]
    wanted = [*range(100, 120), 7, 8, *range(300, 320), 5]
    found = match(cached, wanted, placeholder=[7, 8], anchor=4)
    assert found.removals == ()  # twenty kept for thirty that have to be run does not pay
    cached += range(400, 440)
    wanted[-1:] = [*range(400, 440), 5]
    found = match(cached, wanted, placeholder=[7, 8], anchor=4)
    assert found.removals == (Removal(20, 50, replaced=True),)
    assert found.new_from == len(wanted) - 1
    assert match(cached, wanted, anchor=4).kept == 20  # not configured: what is cached ends where they part


def test_ids_that_are_almost_equal_do_not_match():
    cached = list(range(100))
    wanted = [*range(50), 777, *range(51, 100)]
    assert match(cached, wanted) == Match((), 50, 50)


def test_hostile_ids_take_linear_time():
    ones = np.ones(40_000, dtype=np.int64)
    hostile = [
        (ones, np.concatenate([ones[:20_000], [2], ones[:20_000]])),
        (np.concatenate([ones, [2], ones]), np.concatenate([[2], ones])),
        (np.tile([1, 1, 1, 1, 1, 1, 1, 1, 2], 5000), np.tile([1, 1, 1, 1, 1, 1, 1, 1, 1, 3], 5000)),
    ]
    started = time.perf_counter()
    for cached, wanted in hostile:
        match(cached, wanted, placeholder=[1, 1, 2], starts={1})
    assert time.perf_counter() - started < 5


@given(ids, ids, st.lists(st.integers(0, 3), max_size=2), st.integers(0, 14))
def test_a_match_that_is_cut_short_is_still_right(cached, wanted, placeholder, position):
    found = match(cached, wanted, placeholder=placeholder, anchor=1)
    shorter = before(found, position, len(placeholder))
    assert rebuilt(cached, shorter, placeholder) == wanted[: shorter.new_from]
    assert shorter.kept_until <= max(position, found.kept_until if position >= found.kept_until else 0)
    assert all(removal.end < shorter.kept_until for removal in shorter.removals)
