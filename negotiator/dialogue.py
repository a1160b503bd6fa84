"""One negotiation, from the first utterance to its score, as a coroutine; many run at once (`rollout.run`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    on_utterance: Callable[[], None] = lambda: None  # for a progress display


async def negotiate(table: Table, step: int, scenario: Scenario, index: int) -> Dialogue:
    """Runs dialogue `index` of a scenario's group. Rounds of one utterance each, judged, until agreement or the last.

    With agreement, agent 1 writes the completion and the reward judge scores it. A judge that could not tell makes the
    dialogue "failed": it has no reward, which is not the same as reward 0.
    """
    dialogue = Dialogue(scenario, index)
    seed = (table.seed, step, scenario.index, index)
    for _ in range(table.config.max_rounds):
        for agent in AGENTS:
            dialogue.utterances.append(
                await _speak(table, dialogue, agent, derive_seed(*seed, len(dialogue.utterances)))
            )
            table.on_utterance()
        verdict = await table.agreement.agreement(scenario, dialogue)
        dialogue.verdicts.append(verdict)
        if verdict.failure is not None:
            dialogue.failure = f"agreement judge: {verdict.failure}"
            return dialogue
        if verdict.agree:
            break
    else:
        dialogue.state = "no_agreement"
        return dialogue

    prompt_ids = table.templates.completion_prompt(scenario, [utterance.text for utterance in dialogue.utterances])
    sampling = SamplingParams(
        max_tokens=table.config.completion_max_tokens,
        temperature=table.config.completion_temperature,
        top_p=table.config.completion_top_p,
        seed=derive_seed(*seed, "completion"),
        stop_ids=table.stop_ids,
    )
    generation = await table.engine.generate(prompt_ids, sampling)
    dialogue.completion = _text(table, generation)
    score = await table.reward.score(scenario, dialogue)
    if score.failure is not None:
        dialogue.failure = f"reward judge: {score.failure}"
        return dialogue
    dialogue.score = score
    dialogue.state = "scored"
    return dialogue


async def _speak(table: Table, dialogue: Dialogue, agent: Agent, seed: int) -> Utterance:
    texts = [utterance.text for utterance in dialogue.utterances]
    prompt_ids, prefix_len = table.templates.utterance_prompt(dialogue.scenario, agent, texts, table.config.window)
    sampling = SamplingParams(
        max_tokens=table.config.max_tokens,
        temperature=table.config.temperature,
        top_p=table.config.top_p,
        seed=seed,
        stop_ids=table.stop_ids,
    )
    generation = await table.engine.generate(prompt_ids, sampling)
    return Utterance(agent, _text(table, generation), prompt_ids, prefix_len, generation)


def _text(table: Table, generation: Generation) -> str:
    text = table.tokenizer.decode(list(generation.ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "one sequence of ids decodes to one string"
    return text.strip()
