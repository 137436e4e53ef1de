"""What is recomputed in training is what an erase recomputes: the same tokens, which see the same, with the same states."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
import torch

import kveraser as kv
from conftest import prefill, random_eraser, text_model, token_ids
from kveraser.readers import calibrate
from kveraser.training.lessons import Erase, Lesson, Probe
from kveraser.training.prepared import prepare
from kveraser.training.rereading import Repairing, reread

FIRST, SECOND = kv.Span(20, 34), kv.Span(90, 97)
PROBES = (Probe((80, 81, 90), (90, 91)), Probe((81, 90), (90, 91), False, 0, "query_cached"))
LESSON = Lesson(
    tuple(token_ids(190)[0].tolist()), (Erase((FIRST,), PROBES), Erase((FIRST, SECOND), PROBES)), ((80, 81),)
)
KEYS = 12
"""Few enough that these contexts are too long to show everything: samples stand for the rest."""


@lru_cache(maxsize=1)
def calibration():
    return calibrate(text_model(), token_ids(600)[0])


def eraser_of(acts_on):
    eraser = random_eraser(text_model(), window=(2, 30))
    eraser.config = replace(eraser.config, acts_on=acts_on)
    eraser.calibration = calibration()
    return eraser


@torch.no_grad()
def erased(case, method):
    """The cache of a case after an erase, and which of its tokens that recomputed."""
    cache = prefill(text_model(), case.ids[None])
    receipt = kv.erase(text_model(), cache, case.ids[None], list(case.erase.spans), method=method)
    return cache, receipt


def at(states, slots):
    return [part[:, :, slots] for pair in states for part in pair]


def layers(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


@pytest.mark.parametrize(
    ("acts_on", "repair", "keys"),
    [("spans", 64, KEYS), ("spans", 128, 512), ("readers", 64, KEYS), ("readers", 128, 512)],
)
def test_the_states_of_a_training_row_are_those_of_an_erase(acts_on, repair, keys):
    model, eraser = text_model(), eraser_of(acts_on)
    method = kv.Steering(eraser, repair=repair, keys=keys)
    learned = eraser.steers_readers
    with torch.no_grad():
        prepared = prepare(model, [LESSON], Repairing(repair, calibration(), learned, keys))
        cases = prepared.prefilled.cases
        states = prepared.repaired
        if learned:
            states = reread(eraser.attached(model), prepared.prefilled, cases, prepared.repairs).opened(model)
    start, sampled = 0, 0
    for case, again in zip(cases, prepared.repairs, strict=True):
        cache, receipt = erased(case, method)
        own = slice(start, start + len(again))
        start = own.stop
        assert receipt.tokens_recomputed == len(again) + (0 if learned else sum(map(len, case.erase.spans)))
        sampled += again.stand_for is not None
        for trained, real in zip(at(states, own), at(layers(cache), again.slots), strict=True):
            torch.testing.assert_close(trained, real, atol=1e-4, rtol=1e-4)
    assert bool(sampled) == (keys == KEYS)


def test_an_eraser_that_acts_on_readers_writes_other_states_there_and_nowhere_else_and_a_fresh_one_the_neutral_ones():
    model, context = text_model(), torch.tensor([LESSON.ids])
    plain = kv.KVEraser.neutral(model)
    plain.calibration = calibration()
    fresh = kv.KVEraser.new(model, rank=4, acts_on="readers")
    fresh.calibration = calibration()
    found = {}
    for name, eraser in (("neutral", plain), ("fresh", fresh), ("learned", eraser_of("readers"))):
        cache = prefill(model, context)
        kv.erase(model, cache, context, FIRST, method=kv.Steering(eraser, repair=64))
        found[name] = layers(cache)
    neutral, other, learned = (torch.cat([torch.stack(pair) for pair in found[name]]) for name in found)
    assert torch.equal(neutral, other)
    before = torch.cat([torch.stack(pair) for pair in layers(prefill(model, context))])
    readers = (neutral != before).amax(dim=(0, 1, 2, 4))
    readers[FIRST.slice] = False
    assert readers.sum() == 64
    changed = (learned != neutral).amax(dim=(0, 1, 2, 4))
    assert torch.equal(changed, readers)
