"""One policy on all items, greedy and sampled: it negotiates the conflicts with itself and answers the open questions.

Greedy is temperature 0 for everything. Sampled is as configured; an answer to an open question is sampled like an
utterance and may be as long as a completion. Both policies get the same seeds, so that one policy against itself says
the same twice, and differences between two owe less to chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from negotiator.config import Config, DialogueConfig
from negotiator.data import load_eval_conflict, load_eval_open
from negotiator.dialogue import AGENTS, Table, answer, negotiate
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.evaluate.policies import Policy, load_policy
from negotiator.evaluate.records import MODES, ItemSet, Journal, Mode, Text, TextKey
from negotiator.evaluate.work import for_each
from negotiator.judges import AgreementJudge, RewardJudge
from negotiator.models import load_model_config
from negotiator.prompts.templates import Templates, stop_ids
from negotiator.seeds import derive_seed
from negotiator.types import Dialogue, Persona, Scenario

NOBODY = Persona("", "")


@dataclass(frozen=True, slots=True)
class Items:
    """Open questions are scenarios without personas."""

    conflict: list[Scenario]
    open: list[Scenario]

    def of(self, item_set: ItemSet) -> list[Scenario]:
        return self.conflict if item_set == "conflict" else self.open


def load_items(first: int | None) -> Items:
    """The first so many of each set, or all 100."""
    questions = [Scenario(i, d, NOBODY, NOBODY, "") for i, d in enumerate(load_eval_open())]
    return Items(load_eval_conflict()[:first], questions[:first])


@dataclass(frozen=True, slots=True)
class Task:
    """One text that is to be written."""

    mode: Mode
    set: ItemSet
    scenario: Scenario

    def key(self, policy: Policy) -> TextKey:
        return policy.side, self.mode, self.set, self.scenario.dilemma.id


def unplayed(policy: Policy, items: Items, texts: Journal[Text]) -> list[Task]:
    """What a judge has failed on is tried again. Both modes of an item are neighbours, as their prompts begin alike."""
    sets: tuple[ItemSet, ItemSet] = ("conflict", "open")
    tasks = [Task(mode, name, scenario) for name in sets for scenario in items.of(name) for mode in MODES]
    done = {key for key, text in texts.records.items() if text.failure is None}
    return [task for task in tasks if task.key(policy) not in done]


def require_room(policy: Policy, items: Items, config: Config) -> None:
    """Raises ValueError where the longest dialogue would fit neither the model's context nor the engine's cache."""
    templates = Templates(policy.tokenizer)
    said, window = 2 * config.dialogue.max_rounds, config.dialogue.window
    shown = said if window == "all" else min(window, said)
    prompts = [templates.utterance_prompt(s, agent, [], "all")[0] for s in items.conflict for agent in AGENTS]
    utterance = max(map(len, prompts)) + (shown + 1) * config.dialogue.max_tokens
    prompts = [templates.completion_prompt(scenario, []) for scenario in items.conflict]
    completion = max(map(len, prompts)) + said * config.dialogue.max_tokens + config.dialogue.completion_max_tokens
    prompts = [templates.answer_prompt(scenario.dilemma.text) for scenario in items.open]
    longest = max(utterance, completion, max(map(len, prompts)) + config.dialogue.completion_max_tokens)
    context = load_model_config(policy.base or policy.folder).max_position_embeddings
    if longest > context:
        raise ValueError(
            f"a dialogue can take {longest:,} tokens but {policy.label} sees {context:,}: lower dialogue.max_rounds, "
            "max_tokens or completion_max_tokens"
        )
    if longest > config.engine.cache_tokens:
        raise ValueError(f"a dialogue can take {longest:,} tokens: raise engine.cache_tokens to that")


async def play(
    policy: Policy,
    tasks: Sequence[Task],
    config: Config,
    place: tuple[torch.device, torch.dtype],
    judges: tuple[AgreementJudge, RewardJudge],
    texts: Journal[Text],
) -> None:
    """Does the tasks, and adds each text to the journal as soon as it is complete."""
    print(f"loading {policy.folder} ...", flush=True)
    model = load_policy(policy, *place)
    engine = EmbeddedEngine(model, config.engine)
    print(f"{policy.side} ({policy.label}): text from {engine.path}", flush=True)
    templates = Templates(policy.tokenizer)

    def table(mode: Mode, item_set: ItemSet) -> Table:
        return Table(
            engine=engine,
            tokenizer=policy.tokenizer,
            templates=templates,
            stop_ids=stop_ids(policy.tokenizer, model.generation_config.eos_token_id),
            agreement=judges[0],
            reward=judges[1],
            config=dialogue_config(config.dialogue, mode, item_set),
            seed=derive_seed(config.seed, "evaluation", mode, item_set),
        )

    sets: tuple[ItemSet, ItemSet] = ("conflict", "open")
    tables = {(mode, item_set): table(mode, item_set) for mode, item_set in itertools.product(MODES, sets)}

    async def one(task: Task) -> None:
        at = tables[task.mode, task.set]
        if task.set == "conflict":
            dialogue = await negotiate(at, 0, task.scenario, 0, always_complete=True)
        else:
            dialogue = await answer(at, 0, task.scenario, 0)
        texts.add(as_text(policy, task, dialogue))

    # No more at once than the engine runs: further ones would only wait, and be lost if this is stopped.
    await for_each(f"{policy.side} ({policy.label})", tasks, one, config.engine.max_running)
    await engine.close()


def dialogue_config(config: DialogueConfig, mode: Mode, item_set: ItemSet) -> DialogueConfig:
    changed: dict[str, float] = {}
    if mode == "greedy":
        changed = {"temperature": 0.0, "completion_temperature": 0.0}
    if item_set == "open":
        changed["max_tokens"] = config.completion_max_tokens
    return config.model_copy(update=changed)


def as_text(policy: Policy, task: Task, dialogue: Dialogue) -> Text:
    open_question = task.set == "open"
    return Text(
        policy=policy.side,
        mode=task.mode,
        set=task.set,
        item=task.scenario.dilemma.id,
        agreed=not open_question and dialogue.state == "scored",
        failure=dialogue.failure,
        rounds=dialogue.rounds,
        utterances=[] if open_question else [utterance.text for utterance in dialogue.utterances],
        completion=dialogue.completion,
        score=dialogue.score.score if dialogue.score else None,
    )
