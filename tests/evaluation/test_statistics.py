"""Bootstrap intervals: they cover, they repeat, they are paired."""

from __future__ import annotations

import numpy as np
import pytest

from kveraser.evaluation.statistics import Interval, group_mean, interval, of_proportion, resampled_means


def test_the_interval_of_known_data_covers_its_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = rng.exponential(2.0, (60, 1))
        found = interval(group_mean([values])[0], resampled_means([values], trial, 500)[:, 0])
        covered += found.low <= 2.0 <= found.high
    assert 175 <= covered <= 200


def test_the_interval_is_as_wide_as_theory_has_it():
    values = np.random.default_rng(1).normal(5.0, 1.0, (400, 1))
    found = interval(values.mean(), resampled_means([values], 0)[:, 0])
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 / 20, rel=0.1)


def test_the_same_seed_gives_the_same_interval_and_another_one_another():
    values = np.random.default_rng(2).normal(size=(30, 2))
    assert (resampled_means([values], 7) == resampled_means([values], 7)).all()
    assert (resampled_means([values], 7) != resampled_means([values], 8)).any()


def test_columns_are_resampled_with_the_same_examples():
    values = np.random.default_rng(3).normal(size=(30, 1))
    draws = resampled_means([np.hstack([values, values + 1.0])], 0)
    assert np.allclose(draws[:, 1] - draws[:, 0], 1.0)


def test_every_group_counts_the_same_whatever_its_size():
    groups = [np.zeros((2, 1)), np.ones((20, 1))]
    assert group_mean(groups)[0] == 0.5
    assert np.allclose(resampled_means(groups, 0), 0.5)  # resampled within the groups, which are constant here


def test_one_example_has_an_interval_without_width():
    values = np.array([[3.0]])
    found = interval(3.0, resampled_means([values], 0)[:, 0])
    assert (found.mean, found.low, found.high) == (3.0, 3.0, 3.0)


def test_what_is_not_defined_has_no_interval():
    assert interval(np.nan, np.zeros(5)) is None
    assert interval(1.0, np.array([0.0, np.inf])) is None


@pytest.mark.parametrize(
    ("groups", "low", "high"),
    [
        ([[0.0] * 100], 0.0, 1 - 0.025**0.01),
        ([[1.0] * 3, [1.0] * 3], 0.025 ** (1 / 6), 1.0),
        ([[1.0] * 3, [0.0] * 3, [1.0] * 3], 2 / 3 - 2 / 3 * (1 - 0.025 ** (1 / 6)), 2 / 3 + (1 - 0.025 ** (1 / 3)) / 3),
        ([[1.0], [0.0]], 0.5 - 0.975 / 2, 0.5 + 0.975 / 2),
    ],
)
def test_a_proportion_of_groups_that_are_all_right_or_all_wrong_has_exact_bounds(groups, low, high):
    tables = [np.array(group) for group in groups]
    mean = float(np.mean([table.mean() for table in tables]))
    found = of_proportion(Interval(mean, mean, mean), tables)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert 0 <= found.low <= mean <= found.high <= 1


def test_a_proportion_that_varies_within_a_group_keeps_its_bootstrap_interval():
    found = Interval(0.75, 0.5, 1.0)
    assert of_proportion(found, [np.array([1.0, 0.0]), np.array([1.0, 1.0])]) is found
