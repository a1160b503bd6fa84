"""What the negotiation asks of a judge. A judge that could not tell says so in the verdict's `failure`."""

from __future__ import annotations

from typing import Protocol

from negotiator.types import AgreementVerdict, Dialogue, Scenario, ScoreVerdict


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
