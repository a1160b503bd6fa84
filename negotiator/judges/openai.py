"""Any OpenAI-compatible endpoint as judge.

A verdict is one answer, or several votes that differ in their seed. An answer that never comes or cannot be read makes
a failed verdict, never a made-up one; what the whole run has to stop for is raised (see `endpoint`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from negotiator.config import JudgeConfig
from negotiator.endpoint import Endpoint, Request, Unanswered
from negotiator.judges.answers import parse_agreement, parse_score, parse_winner
from negotiator.judges.base import Criterion, PairVerdict
from negotiator.judges.quoting import Quoted, quote
from negotiator.prompts.wording import fill, spoken, version
from negotiator.types import AgreementVerdict, Dialogue, Scenario, ScoreVerdict

MAX_TOKENS = 1024  # the answer takes 30; what comes before it in a model that thinks aloud has to fit too
SCHEMAS = {
    "agree": {"type": "boolean"},
    "score": {"type": "integer", "enum": [0, 1, 2, 3, 4, 5]},
    "winner": {"type": "string", "enum": ["A", "B", "tie"]},
}

T = TypeVar("T")


class OpenAIJudge:
    """All judges over one endpoint, for use within one event loop.

    `store`: see `Endpoint`, whose ValueErrors it raises. `repetition`: another one asks anew, with other seeds.
    """

    def __init__(self, config: JudgeConfig, store: Path | None, repetition: int = 0) -> None:
        self._config = config
        self._endpoint = Endpoint(config, store)
        self._closed = False
        self._seeds = range(repetition * config.votes, (repetition + 1) * config.votes)

    async def agreement(self, scenario: Scenario, dialogue: Dialogue) -> AgreementVerdict:
        """P(agree) is the share of votes for it; with one vote, 0 or 1."""
        said = spoken(scenario, [utterance.text for utterance in dialogue.utterances])
        texts = quote(dilemma=scenario.dilemma.text, dialogue=said)
        request = self._request("judge_agreement_openai", texts, self._config.agreement_name, "agree")
        try:
            votes = await self._votes(request, lambda answer: parse_agreement(answer, texts.code))
        except Unanswered as why:
            return AgreementVerdict(False, 0.0, failure=str(why))
        probability = sum(votes) / len(votes)
        return AgreementVerdict(probability >= self._config.agree_threshold, probability)

    async def score(self, scenario: Scenario, dialogue: Dialogue) -> ScoreVerdict:
        """The mean or median of the votes."""
        assert dialogue.completion is not None, "scored before it was completed"
        texts = quote(dilemma=scenario.dilemma.text, completion=dialogue.completion)
        request = self._request("judge_score_openai", texts, self._config.reward_name, "score")
        try:
            votes = await self._votes(request, lambda answer: parse_score(answer, texts.code))
        except Unanswered as why:
            return ScoreVerdict(float("nan"), failure=str(why))
        return ScoreVerdict(statistics.median(votes) if self._config.vote == "median" else statistics.fmean(votes))

    async def compare(self, question: str, first: str, second: str, criterion: Criterion) -> PairVerdict:
        """The winner of more votes than the other."""
        texts = quote(question=question, first=first, second=second)
        wanted = fill(f"judge_compare_openai_{criterion}")
        request = self._request("judge_compare_openai", texts, self._config.evaluation_name, "winner", criterion=wanted)
        try:
            votes = await self._votes(request, lambda answer: parse_winner(answer, texts.code))
        except Unanswered as why:
            return PairVerdict("tie", failure=str(why))
        lead = votes.count("first") - votes.count("second")
        return PairVerdict("first" if lead > 0 else "second" if lead < 0 else "tie")

    async def close(self) -> None:
        """May be called once for each role."""
        if not self._closed:
            self._closed = True
            await self._endpoint.close()

    def _request(self, prompt: str, quoted: Quoted, name: str | None, field: str, **places: str) -> Request:
        name = name or self._config.name
        assert name, "JudgeConfig asks for one"
        rules = fill("judge_openai_rules", nonce=quoted.nonce)
        return Request(
            name=name,
            system=fill(f"{prompt}_system", rules=rules, code=quoted.code, **places),
            user=fill(f"{prompt}_user", nonce=quoted.nonce, **quoted.texts),
            version=version(f"{prompt}_system", f"{prompt}_user", "judge_openai_rules"),
            temperature=self._config.temperature,
            max_tokens=MAX_TOKENS,
            schema=_schema(field),
        )

    async def _votes(self, request: Request, parse: Callable[[str], T]) -> list[T]:
        """The votes that were cast; Unanswered unless they are more than half of those that were asked for."""

        async def vote(seed: int) -> T | Unanswered:
            try:
                return await self._endpoint.ask(dataclasses.replace(request, seed=seed), parse)
            except Unanswered as why:
                return why

        answers = await asyncio.gather(*(vote(seed) for seed in self._seeds))
        votes = [answer for answer in answers if not isinstance(answer, Unanswered)]
        failures = [answer for answer in answers if isinstance(answer, Unanswered)]
        if len(votes) * 2 > len(answers):
            return votes
        raise Unanswered(str(failures[0]) if len(answers) == 1 else f"{len(failures)} votes failed: {failures[0]}")


def _schema(field: str) -> dict[str, Any]:
    """The code is any string here: a schema that held it would make the endpoint write it by itself."""
    return {
        "type": "object",
        "properties": {"code": {"type": "string"}, field: SCHEMAS[field]},
        "required": ["code", field],
        "additionalProperties": False,
    }
