"""Means with bootstrap intervals, paired by example.

Knows: numbers. Does not know what they measure.

Every column of a table of values (one row per example, one column per method) is resampled with the same examples, so
that differences and ratios of columns are paired. Examples come in groups (tasks): they are resampled within their
group, and every group counts the same in the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and its interval, and of how many examples; None in results that did not keep it."""

    mean: float
    low: float
    high: float
    count: int | None = None


def group_mean(groups: Sequence[Values]) -> Values:
    """The mean over groups of the mean over their examples, `(columns,)`.

    Args:
        groups: tables `(examples, columns)`, at least one example each.
    """
    mean: Values = np.mean([group.mean(0) for group in groups], axis=0)
    return mean


def resampled_means(groups: Sequence[Values], seed: int, resamples: int = RESAMPLES) -> Values:
    """`group_mean` of `resamples` bootstrap samples, `(resamples, columns)`; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    means = []
    for group in groups:
        count = len(group)
        drawn = rng.multinomial(count, np.full(count, 1 / count), resamples)  # how often each example is in a sample
        means.append(drawn @ group / count)
    return np.asarray(np.mean(means, axis=0))


def interval(mean: Any, draws: Values, count: int | None = None, level: float = LEVEL) -> Interval | None:
    """The percentile interval of a mean; None where it is not defined (a ratio to nothing).

    Args:
        mean: of the values themselves.
        draws: of the bootstrap samples, `(resamples,)`.
        count: how many examples the mean is over.
    """
    if not (np.isfinite(mean) and np.isfinite(draws).all()):
        return None
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean), float(low), float(high), count)


def of_proportion(found: Interval, groups: Sequence[Values], level: float = LEVEL) -> Interval:
    """The interval of a proportion where each group is all 0 or all 1: bootstrap samples are all the same then.

    The bounds are Clopper and Pearson's for the groups that are all 0 (above) and those that are all 1 (below).

    Args:
        groups: the values of one column, `(examples,)` each. All are taken to be as large as the smallest, which makes the bounds
            too wide rather than too narrow.
    """
    if any((group != group[0]).any() for group in groups):
        return found
    each, smallest = (1 - level) / 2, min(map(len, groups))

    def room(value: int) -> float:
        those = sum(group[0] == value for group in groups)
        return float(those / len(groups) * (1 - each ** (1 / (those * smallest)))) if those else 0.0

    return replace(found, low=found.mean - room(1), high=found.mean + room(0))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation of paired numbers; ties count by their order, 0 for fewer than three."""
    if len(one) < 3:
        return 0.0
    ranks = [np.argsort(np.argsort(np.asarray(numbers), kind="stable"), kind="stable") for numbers in (one, other)]
    matrix: Values = np.atleast_2d(np.corrcoef(np.array(ranks)))
    return float(matrix[0, 1])
