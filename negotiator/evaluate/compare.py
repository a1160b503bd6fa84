"""Both policies' texts on an item, compared by a judge in both orders."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from negotiator.evaluate.play import Items
from negotiator.evaluate.policies import Side
from negotiator.evaluate.records import MODES, Comparison, ItemSet, Journal, Mode, Text
from negotiator.evaluate.work import for_each
from negotiator.judges.base import Criterion, PairJudge, PairVerdict

# An open question holds no conflict that could be resolved.
QUESTIONS: tuple[tuple[ItemSet, Criterion], ...] = (
    ("conflict", "resolution"),
    ("conflict", "collective_agency"),
    ("open", "collective_agency"),
)


@dataclass(frozen=True, slots=True)
class Pair:
    mode: Mode
    set: ItemSet
    item: str
    criterion: Criterion
    question: str
    a: str
    b: str


def uncompared(items: Items, texts: Journal[Text], comparisons: Journal[Comparison]) -> list[Pair]:
    """Pairs of which both texts are there. What the judge has failed on is tried again."""
    pairs = []
    for mode in MODES:
        for item_set, criterion in QUESTIONS:
            for scenario in items.of(item_set):
                item = scenario.dilemma.id
                known = comparisons.records.get((mode, item_set, item, criterion))
                a, b = (texts.records.get((side, mode, item_set, item)) for side in ("A", "B"))
                if (known and known.failure is None) or not (a and b) or a.failure or b.failure:
                    continue
                assert a.completion is not None and b.completion is not None, "neither has failed"
                pairs.append(Pair(mode, item_set, item, criterion, scenario.dilemma.text, a.completion, b.completion))
    return pairs


async def compare(pairs: Sequence[Pair], judge: PairJudge, at_once: int, comparisons: Journal[Comparison]) -> None:
    async def one(pair: Pair) -> None:
        comparisons.add(await in_both_orders(pair, judge))

    await for_each("comparing", pairs, one, at_once)


async def in_both_orders(pair: Pair, judge: PairJudge) -> Comparison:
    """Identical texts are tied, whatever a judge would say."""
    about = (pair.mode, pair.set, pair.item, pair.criterion)
    if pair.a == pair.b:
        return Comparison(*about, a_first="tie", b_first="tie", identical=True, failure=None)
    a_first, b_first = await asyncio.gather(
        judge.compare(pair.question, pair.a, pair.b, pair.criterion),
        judge.compare(pair.question, pair.b, pair.a, pair.criterion),
    )
    return Comparison(
        *about,
        a_first=_winner(a_first, "A", "B"),
        b_first=_winner(b_first, "B", "A"),
        identical=False,
        failure=a_first.failure or b_first.failure,
    )


def _winner(verdict: PairVerdict, first: Side, second: Side) -> Side | Literal["tie"]:
    return {"first": first, "second": second, "tie": "tie"}[verdict.winner]
