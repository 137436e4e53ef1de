"""What of a cached context a request can use, against what was done to it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kveraser.serving.contexts import blocks, matching
from kveraser.serving.contexts.matching import Change, Prices, match

few = st.lists(st.integers(0, 3), max_size=30)
FREE = Prices(0, 0)


def applied(cached, wanted, found):
    """The cached ids with the changes that were seen."""
    out, at = [], 0
    for change in found.changes:
        out += [*cached[at : change.start], *wanted[change.new_start : change.new_end]]
        at = change.end
    return out + list(cached[at : found.kept_until])


def check(cached, wanted, found):
    """A match is in order, keeps something behind every change, and gives the ids that are wanted."""
    assert applied(cached, wanted, found) == list(wanted[: found.new_from])
    at = 0
    for change in found.changes:
        assert at <= change.start < change.end < found.kept_until
        at = change.end + 1
    assert 0 <= found.kept_until <= len(cached)


@given(few, few, st.integers(0, 4), st.booleans(), st.sets(st.integers(0, 3)))
def test_the_changes_of_a_match_give_the_request_id_by_id(cached, wanted, price, may_grow, starts):
    found = match(cached, wanted, gram=3, worth=0.0, prices=Prices(price, 1, may_grow), starts=starts)
    check(cached, wanted, found)
    kept = found.new_from - sum(change.added for change in found.changes)
    spent = sum(price + max(change.removed - change.added, 0) for change in found.changes)
    given_up = sum(change.added > change.removed for change in found.changes)  # one id where something is put in
    assert kept - spent <= found.gain <= kept - spent + given_up
    assert may_grow or all(change.added <= change.removed for change in found.changes)


def edited(seed):
    """Ids, and the same with some runs taken out, replaced or put in, and new ones behind; and how many that leaves, at how many edits."""
    draw = random.Random(seed)
    cached = draw.sample(range(10**6), draw.randint(40, 200))
    fresh = iter(range(2 * 10**6, 3 * 10**6))
    wanted, at, edits, kept = [], 0, 0, 0
    while at < len(cached):
        run = draw.randint(10, 40)
        wanted += cached[at : at + run]
        kept += len(cached[at : at + run])
        at += run
        if at < len(cached):
            gone, added = draw.randint(0, 12), draw.randint(0, 12)
            wanted += [next(fresh) for _ in range(added)]
            at, edits = at + gone, edits + bool(gone or added)
    return cached, [*wanted, *(next(fresh) for _ in range(draw.randint(0, 5)))], edits, kept


@given(st.integers(0, 10**6))
def test_whatever_is_taken_out_replaced_or_put_in_is_seen_and_all_else_is_kept(seed):
    cached, wanted, edits, kept = edited(seed)
    found = match(cached, wanted, prices=FREE, worth=0.0)
    check(cached, wanted, found)
    unseen = 8 + edits  # a rest shorter than a gram, and an id for everything that is put in
    assert found.gain >= kept - unseen


@given(st.integers(0, 10**6))
def test_where_nothing_can_be_put_in_what_is_found_is_still_right(seed):
    cached, wanted, _, _ = edited(seed)
    found = match(cached, wanted, prices=Prices(3, 1, may_grow=False), worth=0.0)
    check(cached, wanted, found)
    assert all(change.added <= change.removed for change in found.changes)


def test_a_time_in_the_first_line_a_cleared_result_a_thought_and_a_dropped_message_are_all_seen_at_once():
    head, result, answer, thought = range(100, 140), range(200, 290), range(300, 330), range(400, 460)
    more, dropped, end = range(500, 540), range(600, 650), range(700, 720)
    cached = [1, 2, 3, *head, *result, *answer, *thought, *more, *dropped, *end]
    wanted = [1, 2, 9, *head, 7, 8, *answer, *more, *end, 5, 5]
    found = match(cached, wanted, prices=FREE)
    check(cached, wanted, found)
    assert found.changes == (
        Change(2, 3, 2, 3),  # the time
        Change(43, 133, 43, 45),  # the result
        Change(163, 223, 75, 75),  # the thought
        Change(263, 313, 115, 115),  # the message
    )
    assert (found.kept_until, found.new_from) == (len(cached), len(wanted) - 2)


def test_more_than_sixteen_runs_are_taken_out():
    rounds = [list(range(1000 * n, 1000 * n + 30)) for n in range(1, 61)]
    cached = [token for each in rounds for token in each]
    wanted = [token for each in rounds for token in (*each[:10], *each[20:])]
    found = match(cached, wanted, prices=FREE)
    assert len(found.changes) == 60
    check(cached, wanted, found)


def test_the_chosen_changes_save_the_most_and_none_is_made_that_takes_more_than_it_saves():
    cached = [*range(100, 150), *range(200, 230), *range(300, 400)]
    wanted = [*range(100, 150), 1, *range(200, 230), 2, *range(300, 400)]
    wanted[50:50] = range(5000, 5020)
    assert [change.end for change in match(cached, wanted, prices=FREE).changes] == [50, 80]
    dear = match(cached, wanted, prices=Prices(change=60))
    assert [(change.start, change.end) for change in dear.changes] == [(50, 80)]  # thirty are not worth sixty
    assert match(cached, wanted, prices=Prices(change=120)).changes == ()


def test_a_long_change_takes_as_many_readers_as_its_ids_have():
    cached = [*range(100, 150), *range(200, 240), *range(300, 400)]
    wanted = [*range(100, 150), *range(300, 400)]
    assert match(cached, wanted, prices=Prices(change=70, removed=0, readers=2)).gain == 50 + 100 - 80
    assert match(cached, wanted, prices=Prices(change=90, removed=0, readers=2)).gain == 50 + 100 - 90
    assert match(cached, wanted, prices=Prices(change=70, removed=0, readers=3)).changes == ()


def test_what_saves_next_to_nothing_is_left_and_said_to_be():
    cached = [*range(100, 120), *range(200, 300), *range(400, 415)]
    wanted = [*range(100, 120), *range(1000, 1190), *range(400, 415)]
    found = match(cached, wanted, prices=FREE)
    assert (found.gain, found.worth_it, len(found.changes)) == (20, False, 1)
    assert match(cached, wanted, prices=FREE, worth=0.0).worth_it


def test_the_markup_between_results_is_kept_though_it_is_always_the_same():
    markup, results = list(range(20)), [list(range(1000 * n, 1000 * n + 60)) for n in range(1, 6)]
    cached = [50, *(token for result in results for token in (*markup, *result))]
    wanted = [50, *[*markup, 7, 8] * 4, *markup, *results[4]]
    found = match(cached, wanted, prices=FREE)
    check(cached, wanted, found)
    assert [(change.removed, change.added) for change in found.changes] == [(60, 2)] * 4


@given(st.lists(st.lists(st.integers(1, 500), min_size=9, max_size=20, unique=True), min_size=2, max_size=8), st.data())
def test_dropped_messages_are_found_whole(contents, data):
    messages = [[0, 600 + index, *content] for index, content in enumerate(contents)]
    dropped = data.draw(st.sets(st.integers(0, len(messages) - 2), max_size=3))
    cached = [token for message in messages for token in message]
    wanted = [token for index, message in enumerate(messages) if index not in dropped for token in message]
    found = match(cached, [*wanted, 999], starts={0}, gram=4, worth=0.0)
    gone = sum(len(messages[index]) for index in dropped)
    assert found.gain >= len(cached) - 2 * gone
    if found.kept_until == len(cached) and found.new_from == len(wanted) == len(cached) - gone:
        assert all(cached[change.start] == 0 for change in found.changes if not change.added)


def test_of_two_messages_alike_in_their_beginning_the_whole_one_is_taken_out():
    first, second, third = [0, 7, 1, 2, 3, 9], [0, 7, 4, 5, 6, 9], [0, 8, 1, 1, 1, 9, 5, 5, 5]
    found = match([*first, *second, *third], [*first, *third, 4], starts={0}, gram=3)
    assert (found.changes, found.kept_until, found.new_from) == ((Change(6, 12, 6, 6),), 21, 15)
    assert match([*first, *second, *third], [*second, *third], starts={0}, gram=3).changes == (Change(0, 6, 0, 0),)


def test_a_result_that_was_read_twice_can_be_cleared_once():
    page = list(range(1000, 1400))
    cached = [*range(50), *page, *range(100, 130), *page, *range(200, 230)]
    wanted = [*range(50), 7, *range(100, 130), *page, *range(200, 230), 5]
    found = match(cached, wanted)
    assert found.changes == (Change(50, 450, 50, 51),)
    assert found.kept_until == len(cached)


@pytest.mark.parametrize("at", [0, 1, 30, 51, 52, 59])
def test_one_id_that_is_another_one_now_is_one_change(at):
    cached = list(range(100, 160))
    wanted = [*cached[:at], 10**7, *cached[at + 1 :]]
    found = match(cached, wanted, prices=FREE)
    if at <= len(cached) - 9:
        assert found.changes == (Change(at, at + 1, at, at + 1),)
    else:
        assert (found.changes, found.kept_until) == ((), at)


@pytest.mark.parametrize("size", [2_000, 8_000])
def test_hostile_ids_take_a_number_of_steps_that_is_linear(size, monkeypatch):
    """Counted: the ids that are compared, and the blocks that are weighed."""
    looked, weighed = [], []
    original, step = blocks.common_length, matching._step

    def counted(left, right):
        found = original(left, right)
        looked.append(found + 64)
        return found

    for module in (blocks, matching):
        monkeypatch.setattr(module, "common_length", counted)
    monkeypatch.setattr(matching, "_step", lambda *args: weighed.append(args) or step(*args))
    ones, once = np.ones(size, dtype=np.int64), np.random.default_rng(0).permutation(size) + 5
    for cached, wanted in [
        (ones, np.concatenate([ones[: size // 2], [2], ones[: size // 2]])),
        (np.concatenate([ones, [2], ones]), np.concatenate([[2], ones])),
        (np.tile([1, 1, 1, 1, 1, 1, 1, 1, 2], size // 9), np.tile([1, 1, 1, 1, 1, 1, 1, 1, 1, 3], size // 10)),
        (once, once.reshape(-1, 10)[::-1].reshape(-1)),
        (once, np.delete(once, np.arange(0, size, 10))),
    ]:
        looked.clear()
        weighed.clear()
        check(cached.tolist(), wanted.tolist(), match(cached, wanted, starts={1}))
        assert sum(looked) <= 4 * (len(cached) + len(wanted)) + 64 * len(looked)
        assert len(looked) <= 6 * blocks.MAX_BLOCKS + 1
        assert len(weighed) <= 6 * (blocks.MAX_BLOCKS + 1)
