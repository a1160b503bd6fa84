"""What the rollout benchmark asks of everybody: the next utterance of many negotiations that share prefixes exactly.

The prompts are the trainer's own: persona, dilemma and discussion through the model's chat template, other dilemmas
standing in for what was said. They are cut so that the G dialogues of a scenario have exactly `prefix` tokens in common
and then OWN tokens each: a word that no other dialogue has there, and the end of the template. The text is fixed; no
stop token ends it early.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from negotiator.data import load_dilemmas, load_personas
from negotiator.engines.reuse import PerfectCache
from negotiator.prompts.templates import Templates
from negotiator.seeds import derive_seed
from negotiator.types import Dilemma, SamplingParams, Scenario

OWN = 8  # tokens
TEMPERATURE, TOP_P = 0.7, 0.95


class Shape(NamedTuple):
    scenarios: int
    group: int  # dialogues of a scenario
    prefix: int  # tokens that they share
    new_tokens: int  # of every dialogue

    def __str__(self) -> str:
        return f"{self.scenarios} x {self.group} dialogues, prefix {self.prefix}, {self.new_tokens} new tokens"

    @property
    def dialogues(self) -> int:
        return self.scenarios * self.group

    @property
    def length(self) -> int:
        """Tokens of a dialogue in the end."""
        return self.prefix + OWN + self.new_tokens

    @property
    def cache_tokens(self) -> int:
        """What has to be held when every prefix is held once."""
        return self.scenarios * self.prefix + self.dialogues * (OWN + self.new_tokens)


class Workload(NamedTuple):
    shape: Shape
    prefixes: list[tuple[int, ...]]  # one a scenario
    prompts: list[tuple[int, ...]]  # scenario after scenario

    def sampling(self, dialogue: int) -> SamplingParams:
        seed = derive_seed("rollout benchmark", dialogue)
        return SamplingParams(self.shape.new_tokens, TEMPERATURE, TOP_P, seed)

    def reusable_tokens(self) -> int:
        """Prompt tokens that a perfect cache, empty at first, need not compute: prefixes are sent, then prompts."""
        cache = PerfectCache()
        reusable = 0
        for ids in (*self.prefixes, *self.prompts):
            reusable += cache.reusable(ids)
            cache.hold(ids)
        return reusable


def make_workload(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> Workload:
    templates = Templates(tokenizer)
    dilemmas, pairs = load_dilemmas(), load_personas()
    parties = [(pair.id, *order) for pair in pairs for order in ((pair.a, pair.b), (pair.b, pair.a))]
    prefixes, prompts = [], []
    words = _distinct_tokens(tokenizer, dilemmas, shape.dialogues)
    for index in range(shape.scenarios):
        pair, one, two = parties[index % len(parties)]
        scenario = Scenario(index, dilemmas[index], one, two, pair)
        ids = _long_prompt(templates, scenario, dilemmas, shape.prefix + OWN)
        prefix, ending = ids[: shape.prefix], ids[-(OWN - 1) :]
        prefixes.append(prefix)
        prompts += [(*prefix, words.pop(), *ending) for _ in range(shape.group)]
    return Workload(shape, prefixes, prompts)


def _long_prompt(templates: Templates, scenario: Scenario, dilemmas: Sequence[Dilemma], length: int) -> tuple[int, ...]:
    """An utterance's prompt of at least `length` tokens."""
    for turns in range(0, len(dilemmas), 2):
        ids, _ = templates.utterance_prompt(scenario, "agent1", [d.text for d in dilemmas[:turns]], "all")
        if len(ids) >= length:
            return ids
    raise ValueError(f"all {len(dilemmas)} dilemmas together are shorter than {length} tokens: choose a shorter prefix")


def _distinct_tokens(tokenizer: PreTrainedTokenizerBase, dilemmas: Sequence[Dilemma], count: int) -> list[int]:
    found: dict[int, None] = {}
    for dilemma in dilemmas:
        found |= dict.fromkeys(tokenizer.encode(dilemma.text, add_special_tokens=False))
        if len(found) >= count:
            return list(found)[:count]
    raise ValueError(f"the dilemmas have {len(found)} different tokens, fewer than the {count} dialogues asked for")
