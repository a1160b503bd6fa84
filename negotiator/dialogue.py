"""One dialogue, from the first utterance to its score, as a coroutine; many run at once (`rollout.run`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from negotiator.config import DialogueConfig
from negotiator.engines.base import Engine
from negotiator.judges.base import AgreementJudge, RewardJudge
from negotiator.prompts.templates import Templates
from negotiator.seeds import derive_seed
from negotiator.types import Agent, Dialogue, Generation, SamplingParams, Scenario, Utterance

AGENTS: tuple[Agent, Agent] = ("agent1", "agent2")


@dataclass(frozen=True, slots=True)
class Table:
    """What every negotiation of a run needs: who generates, who judges, how it is worded and bounded."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    templates: Templates
    stop_ids: tuple[int, ...]  # tokens that end an utterance or a completion
    agreement: AgreementJudge
    reward: RewardJudge
    config: DialogueConfig
    seed: int
    mode: Literal["negotiate", "single"] = "negotiate"
    on_utterance: Callable[[], None] = lambda: None  # for a progress display


async def negotiate(table: Table, step: int, scenario: Scenario, index: int, always_complete: bool = False) -> Dialogue:
    """Runs dialogue `index` of a scenario's group. Rounds of one utterance each, judged, until agreement or the last.

    With agreement, agent 1 writes the completion and the reward judge scores it; `always_complete`, as in evaluation,
    has it written and scored without agreement, too. A judge that could not tell makes the dialogue "failed": it has no
    reward, which is not the same as reward 0.
    """
    dialogue = Dialogue(scenario, index)
    seed = (table.seed, step, scenario.index, index)
    agreed = False
    while not agreed and dialogue.rounds < table.config.max_rounds:
        for agent in AGENTS:
            await _speak(table, dialogue, agent, derive_seed(*seed, len(dialogue.utterances)))
        verdict = await table.agreement.agreement(scenario, dialogue)
        dialogue.verdicts.append(verdict)
        if verdict.failure is not None:
            dialogue.failure = f"agreement judge: {verdict.failure}"
            return dialogue
        agreed = verdict.agree
    if agreed or always_complete:
        sampling = SamplingParams(
            max_tokens=table.config.completion_max_tokens,
            temperature=table.config.completion_temperature,
            top_p=table.config.completion_top_p,
            seed=derive_seed(*seed, "completion"),
            stop_ids=table.stop_ids,
        )
        texts = [utterance.text for utterance in dialogue.utterances]
        generation = await table.engine.generate(table.templates.completion_prompt(scenario, texts), sampling)
        dialogue.completion = _text(table, generation)
        await _score(table, dialogue)
    if dialogue.failure is None:
        dialogue.state = "scored" if agreed else "no_agreement"
    return dialogue


async def answer(table: Table, step: int, scenario: Scenario, index: int) -> Dialogue:
    """The single-agent baseline: agent 1 alone answers the dilemma, in one utterance that is the completion as well."""
    dialogue = Dialogue(scenario, index)
    prompt_ids = table.templates.answer_prompt(scenario.dilemma.text)
    # All answers share the prompt, but for its last token: the row that predicts an answer's first is the answer's own.
    seed = derive_seed(table.seed, step, scenario.index, index, 0)
    await _utter(table, dialogue, "agent1", prompt_ids, len(prompt_ids) - 1, seed)
    dialogue.completion = dialogue.utterances[-1].text
    await _score(table, dialogue)
    if dialogue.failure is None:
        dialogue.state = "scored"
    return dialogue


async def _speak(table: Table, dialogue: Dialogue, agent: Agent, seed: int) -> None:
    texts = [utterance.text for utterance in dialogue.utterances]
    prompt_ids, prefix_len = table.templates.utterance_prompt(dialogue.scenario, agent, texts, table.config.window)
    await _utter(table, dialogue, agent, prompt_ids, prefix_len, seed)


async def _utter(
    table: Table, dialogue: Dialogue, agent: Agent, prompt_ids: tuple[int, ...], prefix_len: int, seed: int
) -> None:
    sampling = SamplingParams(
        max_tokens=table.config.max_tokens,
        temperature=table.config.temperature,
        top_p=table.config.top_p,
        seed=seed,
        stop_ids=table.stop_ids,
    )
    generation = await table.engine.generate(prompt_ids, sampling)
    dialogue.utterances.append(Utterance(agent, _text(table, generation), prompt_ids, prefix_len, generation))
    table.on_utterance()


async def _score(table: Table, dialogue: Dialogue) -> None:
    score = await table.reward.score(dialogue.scenario, dialogue)
    if score.failure is not None:
        dialogue.failure = f"reward judge: {score.failure}"
    else:
        dialogue.score = score


def _text(table: Table, generation: Generation) -> str:
    text = table.tokenizer.decode(list(generation.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence of ids decodes to one string"
    return text.strip()
