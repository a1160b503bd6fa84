"""How far two lists of verdicts on the same items agree. What is undefined, like the rank of constants, is None."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bin:
    """Items whose figure by the judge lies in [low, high); the last bin holds its end as well."""

    low: float
    high: float
    items: int
    mean: float  # of the judge's figures; 0 without items, like `reference`
    reference: float  # mean of the second judge's


def cohen_kappa(first: Sequence[bool], second: Sequence[bool]) -> float | None:
    """Agreement beyond chance: 1 is full, 0 what two judges would have who say yes as often and know nothing."""
    n = len(first)
    if not n:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    yes, also = sum(first) / n, sum(second) / n
    chance = yes * also + (1 - yes) * (1 - also)
    return (observed - chance) / (1 - chance) if chance < 1 else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Correlation of the ranks; equal values share the mean of theirs."""
    return _pearson(_ranks(first), _ranks(second))


def kendall_tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pairs in the same order less those in the opposite one, of the pairs that neither list ties."""
    both = list(zip(first, second, strict=True))
    signs = [(_sign(a - c), _sign(b - d)) for (a, b), (c, d) in itertools.combinations(both, 2)]
    untied = math.sqrt(sum(a != 0 for a, _ in signs) * sum(b != 0 for _, b in signs))
    return sum(a * b for a, b in signs) / untied if untied else None


def reliability(figures: Sequence[float], reference: Sequence[float], highest: float, bins: int) -> list[Bin]:
    """Both judges' means in `bins` equal parts of 0 to `highest`."""
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for pair in zip(figures, reference, strict=True):
        members[min(int(pair[0] / highest * bins), bins - 1)].append(pair)
    table = []
    for number, own in enumerate(members):
        mean, also = (sum(column) / len(own) for column in zip(*own, strict=True)) if own else (0.0, 0.0)
        table.append(Bin(number * highest / bins, (number + 1) * highest / bins, len(own), mean, also))
    return table


def calibration_error(bins: Sequence[Bin]) -> float | None:
    """Mean distance of the two judges' means, over the bins as often as they have items."""
    items = sum(b.items for b in bins)
    return sum(b.items * abs(b.mean - b.reference) for b in bins) / items if items else None


def _pearson(first: Sequence[float], second: Sequence[float]) -> float | None:
    n = len(first)
    a, b = ([value - sum(values) / n for value in values] for values in (first, second))
    spread = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / spread if spread else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    for _, tied in itertools.groupby(order, key=values.__getitem__):
        places = list(tied)
        for place in places:
            ranks[place] = start + (len(places) - 1) / 2
        start += len(places)
    return ranks


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
