"""Equal runs of two sequences of ids: right, maximal, and found in linear time whatever the ids are."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kveraser.serving.contexts import blocks
from kveraser.serving.contexts.blocks import Block, equal_blocks

few = st.lists(st.integers(0, 3), max_size=40)


def array(ids):
    return np.asarray(ids, dtype=np.int64)


@given(few, few)
def test_the_ids_of_a_block_are_equal_and_go_on_to_neither_side(have, want):
    for block in equal_blocks(array(have), array(want), gram=3):
        (a, b), (c, d) = (block.at, block.at + block.length), (block.new, block.new + block.length)
        assert have[a:b] == want[c:d]
        assert block.length >= 3
        assert not (a and c and have[a - 1] == want[c - 1])
        assert not (b < len(have) and d < len(want) and have[b] == want[d])


@given(few, few)
def test_every_gram_that_both_have_once_is_in_a_block(have, want):
    found = equal_blocks(array(have), array(want), gram=3)
    grams = [[tuple(ids[at : at + 3]) for at in range(len(ids) - 2)] for ids in (have, want)]
    for gram in set(grams[0]) & set(grams[1]):
        if grams[0].count(gram) == grams[1].count(gram) == 1:
            at, new = grams[0].index(gram), grams[1].index(gram)
            assert any(b.diagonal == at - new and b.at <= at and at + 3 <= b.at + b.length for b in found)


def test_of_too_many_runs_the_longest_are_followed():
    have = [*range(100, 110), *range(200, 230), *range(300, 320)]
    want = [*range(300, 320), 1, *range(200, 230), 2, *range(100, 110)]
    assert equal_blocks(array(have), array(want), limit=2) == [Block(40, 0, 20), Block(10, 21, 30)]


def hostile(size):
    """Ids that make naive alignments slow."""
    once = random.Random(0).sample(range(10, 10 * size), size)
    ones = [1] * size
    pieces = [once[at : at + 9] for at in range(0, size, 9)]
    marks = [[*ones[: size // 40], *range(1000 * n, 1000 * n + 9)] for n in range(1, 41)]
    return {
        "one id": (ones, [*ones[: size // 2], 2, *ones[: size // 2]]),
        "one id, moved": ([*ones, 2, *ones], [2, *ones, *ones]),
        "a period": ([1, 1, 1, 1, 1, 1, 1, 1, 2] * (size // 9), [1, 1, 1, 1, 1, 1, 1, 1, 1, 3] * (size // 10)),
        "a period, moved": (list(range(50)) * (size // 50), list(range(25, 75)) * (size // 50)),
        "pieces in another order": (once, [token for piece in reversed(pieces) for token in piece]),
        "marks in what is repeated": (list(chain(*marks)), list(chain(*reversed(marks)))),
        "once and again": (once + once, once[size // 2 :] + once),
        "what is equally often in both": (list(range(40)) * 60, [*list(range(20, 40)) * 60, *list(range(20)) * 60]),
        "nothing": (once, [token + 20 * size for token in once]),
    }


@pytest.mark.parametrize("kind", list(hostile(90)))
def test_no_ids_make_it_look_at_them_more_than_a_few_times(kind, monkeypatch):
    """Counted in ids that are compared; the rest is a fixed number of passes over each sequence, and a sort."""
    original, looked = blocks.common_length, []

    def counted(left, right):
        found = original(left, right)
        looked.append(min(2 * found + 64, len(left), len(right)))  # what the growing steps compare at most
        return found

    monkeypatch.setattr(blocks, "common_length", counted)
    for size in (3600, 14400):
        have, want = map(array, hostile(size)[kind])
        looked.clear()
        found = equal_blocks(have, want)
        assert len(found) <= blocks.MAX_BLOCKS
        assert len(looked) <= 2 * blocks.MAX_BLOCKS
        assert sum(looked) <= 4 * (len(have) + len(want)) + 64 * len(looked) + 8192
