"""From the records of an evaluation to its figures, as one tree that JSON can hold."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from negotiator.evaluate.compare import QUESTIONS
from negotiator.evaluate.play import Items
from negotiator.evaluate.policies import SIDES, Side
from negotiator.evaluate.records import MODES, Ability, Comparison, ItemSet, Mode, Text
from negotiator.evaluate.statistics import Estimate, estimate, paired_difference, wilson
from negotiator.judges.base import Criterion


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often A won, of the pairs in which both orders named the same winner."""

    mode: Mode
    set: ItemSet
    criterion: Criterion
    a_wins: int
    b_wins: int
    tied: int
    identical: int  # of the tied
    inconsistent: int
    failed: int  # to be compared, or before that to be written and judged
    win_rate: Estimate
    wilson: tuple[float, float] | None

    @property
    def pairs(self) -> int:
        return self.a_wins + self.b_wins + self.tied + self.inconsistent + self.failed


@dataclass(frozen=True, slots=True)
class Measure:
    mode: Mode
    name: str
    a: Estimate
    b: Estimate
    difference: Estimate  # A - B over the items that have both


@dataclass(frozen=True, slots=True)
class Summary:
    items: dict[ItemSet, int]
    win_rates: list[WinRate]
    measures: list[Measure]
    failed: dict[Side, dict[Mode, int]]  # items on which a judge failed
    abilities: list[Ability]


def summarize(
    items: Items,
    texts: Sequence[Text],
    comparisons: Sequence[Comparison],
    abilities: Sequence[Ability],
    seed: int,
) -> Summary:
    """Only what is about `items` counts."""
    ids: dict[ItemSet, set[str]] = {
        "conflict": {scenario.dilemma.id for scenario in items.conflict},
        "open": {scenario.dilemma.id for scenario in items.open},
    }
    texts = [text for text in texts if text.item in ids[text.set]]
    comparisons = [comparison for comparison in comparisons if comparison.item in ids[comparison.set]]
    return Summary(
        items={name: len(of) for name, of in ids.items()},
        win_rates=[
            win_rate(
                [c for c in comparisons if (c.mode, c.set, c.criterion) == (mode, item_set, criterion)],
                (mode, item_set, criterion),
                len(ids[item_set]),
                seed,
            )
            for mode in MODES
            for item_set, criterion in QUESTIONS
        ],
        measures=[
            measure(mode, name, [t for t in texts if t.mode == mode and t.set == item_set], value, seed)
            for mode in MODES
            for name, (item_set, value) in MEASURES.items()
        ],
        failed={
            side: {
                mode: sum(t.failure is not None for t in texts if (t.policy, t.mode) == (side, mode)) for mode in MODES
            }
            for side in SIDES
        },
        abilities=list(abilities),
    )


def win_rate(
    comparisons: Sequence[Comparison], about: tuple[Mode, ItemSet, Criterion], pairs: int, seed: int
) -> WinRate:
    """`pairs`: how many there should be; those without a comparison are failed."""
    outcomes = Counter(comparison.outcome for comparison in comparisons)
    in_order = sorted(comparisons, key=lambda c: c.item)  # so that who finished first changes no resample
    won = [float(c.outcome == "A") for c in in_order if c.outcome in ("A", "B")]
    return WinRate(
        *about,
        a_wins=outcomes["A"],
        b_wins=outcomes["B"],
        tied=outcomes["tie"],
        identical=sum(c.identical for c in comparisons),
        inconsistent=outcomes["inconsistent"],
        failed=outcomes["failed"] + pairs - len(comparisons),
        win_rate=estimate(won, seed),
        wilson=wilson(outcomes["A"], len(won)),
    )


def measure(mode: Mode, name: str, texts: Sequence[Text], value: Callable[[Text], float | None], seed: int) -> Measure:
    a, b = (_values([text for text in texts if text.policy == side], value) for side in SIDES)
    return Measure(
        mode, name, estimate([*a.values()], seed), estimate([*b.values()], seed), paired_difference(a, b, seed)
    )


def _values(texts: Sequence[Text], value: Callable[[Text], float | None]) -> Mapping[str, float]:
    """By item, in the order of the items; without those on which a judge failed."""
    found = {text.item: value(text) for text in sorted(texts, key=lambda t: t.item) if text.failure is None}
    return {item: number for item, number in found.items() if number is not None}


def _words(text: str | None) -> float:
    return float(len((text or "").split()))


# Lengths are in words: two policies may have two tokenizers.
MEASURES: dict[str, tuple[ItemSet, Callable[[Text], float | None]]] = {
    "agreement rate, %": ("conflict", lambda text: 100.0 * text.agreed),
    "rounds to agreement": ("conflict", lambda text: float(text.rounds) if text.agreed else None),
    "CA score of the solution, 0 to 5": ("conflict", lambda text: text.score),
    "words in an utterance": ("conflict", lambda text: sum(map(_words, text.utterances)) / len(text.utterances)),
    "words in the solution": ("conflict", lambda text: _words(text.completion)),
    "CA score of the answer, 0 to 5": ("open", lambda text: text.score),
    "words in the answer": ("open", lambda text: _words(text.completion)),
}


def as_json(summary: Summary) -> dict[str, object]:
    return dataclasses.asdict(summary)
