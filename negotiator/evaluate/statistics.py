"""Means over items with intervals.

R = resamples    n = values
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from negotiator.seeds import derive_seed

RESAMPLES = 10_000
LEVEL = 0.95
Z = 1.959964  # of the normal distribution, for LEVEL


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean of `count` values and its interval of 95 %; None where there are no values."""

    mean: float | None
    low: float | None
    high: float | None
    count: int


def estimate(values: Sequence[float], seed: int) -> Estimate:
    """With a percentile bootstrap over the values: the same values and seed give the same interval."""
    if not values:
        return Estimate(None, None, None, 0)
    data = np.asarray(values, dtype=np.float64)
    random = np.random.Generator(np.random.Philox(derive_seed(seed, "bootstrap", len(values))))
    drawn = random.integers(len(data), size=(RESAMPLES, len(data)))  # [R, n]
    low, high = np.quantile(data[drawn].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(data.mean()), float(low), float(high), len(values))


def paired_difference(first: Mapping[str, float], second: Mapping[str, float], seed: int) -> Estimate:
    """Of the mean difference first - second over the items that have both values."""
    return estimate([value - second[item] for item, value in first.items() if item in second], seed)


def wilson(wins: int, count: int) -> tuple[float, float] | None:
    """Wilson's score interval of a share. A bootstrap of 5 wins in 5 says 100 to 100 %, which is not to be believed."""
    if not count:
        return None
    share, z2 = wins / count, Z * Z / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)
