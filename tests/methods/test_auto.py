"""The cost model, and what `auto` makes of it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kveraser as kv
from conftest import prefill, random_eraser, tiny, token_ids
from kveraser.files import cache_folder
from kveraser.methods.cost_model import CostModel, PassCost, cost_model, fit
from kveraser.readers import calibrate


@given(st.floats(1e-4, 1e-1), st.floats(1e-6, 1e-2), st.floats(1e-9, 1e-5))
def test_fitting_exact_samples_finds_their_costs(base, token, pair):
    truth = PassCost(base, token, pair)
    found = fit([(n, c, truth.seconds(n, c)) for n, c in ((8, 0), (128, 0), (512, 0), (64, 960), (512, 512))])
    for tokens, cached in ((16, 100), (300, 4000)):
        assert found.seconds(tokens, cached) == pytest.approx(truth.seconds(tokens, cached), rel=1e-2)


def test_fitted_costs_are_never_negative():
    cost = fit([(8, 0, 0.9), (128, 0, 0.5), (512, 0, 0.4), (64, 960, 0.3), (512, 512, 0.2)])
    assert min(cost.base, cost.token, cost.pair) >= 0


@pytest.mark.parametrize(("suffix", "chosen"), [(5, "full-recompute"), (60, "kveraser")])
def test_auto_recomputes_short_suffixes_and_steers_before_long_ones(suffix, chosen):
    model = tiny()
    ids = token_ids(30 + suffix)
    costs = CostModel(PassCost(0, 1e-3, 0), PassCost(0, 2e-3, 0))
    cache = prefill(model, ids)
    receipt = kv.erase(model, cache, ids, kv.Span(20, 30), method=kv.Auto(costs=costs), eraser=random_eraser(model))
    assert receipt.method == chosen
    assert receipt.exact == (chosen == "full-recompute")


def test_auto_without_a_trained_eraser_steers_with_a_neutral_one():
    model, ids = tiny(), token_ids(40)
    receipt = kv.erase(
        model,
        prefill(model, ids),
        ids,
        kv.Span(5, 9),
        method=kv.Auto(costs=CostModel(PassCost(10.0, 1.0, 0.0), PassCost(0.0, 0.0, 0.0))),
    )
    assert (receipt.method, receipt.eraser) == ("kveraser", "neutral")


def test_the_cost_model_is_measured_once_and_kept():
    model = tiny()
    steering, calibration = random_eraser(model).attached(model), calibrate(model, token_ids(300)[0])
    first = cost_model(model, steering, calibration)
    files = list((cache_folder() / "cost").glob("*.json"))
    assert len(files) == 1
    assert cost_model(model, steering, calibration) == first
    whole = json.loads(files[0].read_text())
    files[0].write_text(json.dumps({"format": whole["format"], **whole["body"]}))  # as it was written without checksum
    assert cost_model(model, steering, calibration) == first
    for damage in (
        "{damaged",
        json.dumps({**whole, "body": {**whole["body"], "plain": asdict(PassCost(0.0, 0.0, 9.0))}}),
    ):
        files[0].write_text(damage)
        assert cost_model(model, steering, calibration).plain.pair < 9.0
        assert json.loads(files[0].read_text()).keys() == whole.keys()
