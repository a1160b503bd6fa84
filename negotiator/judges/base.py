"""What the negotiation asks of a judge. A judge that could not tell says so in the verdict's `failure`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from negotiator.types import AgreementVerdict, Dialogue, Scenario, ScoreVerdict

Criterion = Literal["resolution", "collective_agency"]


@dataclass(frozen=True, slots=True)
class PairVerdict:
    """The evaluation judge's word on two answers to one question, in the order in which they were shown."""

    winner: Literal["first", "second", "tie"]
    failure: str | None = None  # why the judge could not tell; then `winner` means nothing


class AgreementJudge(Protocol):
    async def agreement(self, scenario: Scenario, dialogue: Dialogue) -> AgreementVerdict:
        """Whether the two agree on a core solution after the latest round of `dialogue`."""
        ...

    async def close(self) -> None: ...


class RewardJudge(Protocol):
    async def score(self, scenario: Scenario, dialogue: Dialogue) -> ScoreVerdict:
        """The reward of `dialogue`, whose `completion` is written: 0 to 5, the higher the better."""
        ...

    async def close(self) -> None: ...


class PairJudge(Protocol):
    async def compare(self, question: str, first: str, second: str, criterion: Criterion) -> PairVerdict:
        """Which answer resolves the conflict better for all concerned, or serves Collective Agency more.

        Judges favour places: ask in both orders, and count what they agree on.
        """
        ...

    async def close(self) -> None: ...
