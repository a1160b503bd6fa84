"""A local model as judge: it is asked for one token, and the probabilities of the possible answers are the verdict."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from negotiator.engines.base import Engine
from negotiator.judges.base import Criterion, PairVerdict
from negotiator.prompts.templates import Templates
from negotiator.types import AgreementVerdict, Dialogue, Scenario, ScoreVerdict

DIGITS = tuple("012345")


class LocalJudge:
    """All judges over one engine, which serves the frozen initial policy. A P(yes) of `threshold` counts as agreed.

    Raises ValueError if the tokenizer has no single token for Yes, No or a digit.
    """

    def __init__(self, engine: Engine, templates: Templates, threshold: float) -> None:
        self._engine = engine
        self._templates = templates
        self._threshold = threshold
        self._yes = templates.single_tokens("Yes", "yes", " Yes", " yes", "YES")
        self._no = templates.single_tokens("No", "no", " No", " no", "NO")
        self._warming: dict[Criterion, asyncio.Future[None]] = {}
        self._digits = [templates.single_tokens(digit, f" {digit}") for digit in DIGITS]

    async def warm(self) -> None:
        """Puts what all its prompts share into the engine's cache, so that not each of the first ones computes it."""
        for prefix in self._templates.judge_prefixes():
            await self._engine.warm(prefix)

    async def agreement(self, scenario: Scenario, dialogue: Dialogue) -> AgreementVerdict:
        """P(yes) / (P(yes) + P(no)) as the next token."""
        texts = [utterance.text for utterance in dialogue.utterances]
        prompt_ids = self._templates.agreement_prompt(scenario, texts)
        yes, no = await self._mass(prompt_ids, [self._yes, self._no])
        probability = yes / (yes + no)
        return AgreementVerdict(probability >= self._threshold, probability)

    async def score(self, scenario: Scenario, dialogue: Dialogue) -> ScoreVerdict:
        """Mean of the digits 0 to 5, weighted with their probability as the next token."""
        assert dialogue.completion is not None, "scored before it was completed"
        prompt_ids = self._templates.score_prompt(scenario, dialogue.completion)
        mass = await self._mass(prompt_ids, self._digits)
        return ScoreVerdict(sum(value * p for value, p in enumerate(mass)) / sum(mass))

    async def compare(self, question: str, first: str, second: str, criterion: Criterion) -> PairVerdict:
        """Whether Yes is likelier than No as the next token, to the question if the second is better."""
        if criterion not in self._warming:
            self._warming[criterion] = asyncio.ensure_future(
                self._engine.warm(self._templates.comparison_prefix(criterion))
            )
        await self._warming[criterion]
        yes, no = await self._mass(self._templates.comparison_prompt(first, second, criterion), [self._yes, self._no])
        return PairVerdict("tie" if yes == no else "second" if yes > no else "first")

    async def close(self) -> None:
        await self._engine.close()

    async def _mass(self, prompt_ids: Sequence[int], answers: Sequence[Sequence[int]]) -> list[float]:
        """Probability of each answer, over all its spellings, up to a common factor that keeps it from vanishing."""
        logprobs = await self._engine.next_logprobs(prompt_ids, [token for spellings in answers for token in spellings])
        highest = max(logprobs)
        remaining = iter(logprobs)
        return [sum(math.exp(next(remaining) - highest) for _ in spellings) for spellings in answers]
