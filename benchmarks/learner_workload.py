"""What the learner benchmark trains on.

Dialogues are as `negotiator.packing.turn_samples` gives them: agents speak in turns, every utterance is a sample, and
the samples of one (scenario, agent) share a prefix. The prompt of a dialogue's first utterance adds OWN tokens to it, a
later one's the window of what was said. Token ids are random, so that nobody shares more than the prefix.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from transformers import PretrainedConfig, Qwen3Config

from benchmarks import decode
from benchmarks.workload import OWN
from negotiator.dialogue import AGENTS
from negotiator.seeds import derive_seed
from negotiator.types import TurnSample

MODELS: dict[str, PretrainedConfig] = {
    **{name.lower(): config for name, config in decode.MODELS.items()},
    "qwen3-4b": Qwen3Config(
        vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
    ),
}  # fmt: skip


class Shape(NamedTuple):
    scenarios: int
    group: int  # dialogues of a scenario
    rounds: int  # utterances of each agent
    prefix: int  # tokens that an agent's prompts share
    context: int  # tokens that a later prompt adds to them
    utterance: int  # tokens that are trained, of each utterance

    def __str__(self) -> str:
        return (
            f"{self.scenarios} x {self.group} dialogues of {self.rounds} rounds, prefix {self.prefix}, "
            f"context {self.context}, utterances of {self.utterance}"
        )

    @property
    def tokens(self) -> int:
        """That a step computes when every prefix is computed once: the last of an utterance is never an input."""
        turns = len(AGENTS) * self.rounds
        dialogue = OWN + (turns - 1) * self.context + turns * (self.utterance - 1)
        return self.scenarios * (len(AGENTS) * self.prefix + self.group * dialogue)


class Workload(NamedTuple):
    shape: Shape
    samples: list[TurnSample]


def of_tokens(tokens: int, like: Shape) -> Shape:
    """As many scenarios like that as come closest to `tokens` of a step, or one with fewer dialogues."""
    if tokens >= like.tokens:
        return like._replace(scenarios=round(tokens / like._replace(scenarios=1).tokens))
    shapes = [like._replace(scenarios=1, group=group) for group in range(2, like.group + 1)]
    return min(shapes, key=lambda shape: abs(shape.tokens - tokens))


def make_workload(shape: Shape, vocabulary: int) -> Workload:
    rng = random.Random(derive_seed("learner benchmark", *shape))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(vocabulary), k=count))

    samples = []
    for scenario in range(shape.scenarios):
        prefixes = {agent: ids(shape.prefix) for agent in AGENTS}
        for _ in range(shape.group):
            advantage = rng.gauss(0, 1)
            for turn in range(len(AGENTS) * shape.rounds):
                agent = AGENTS[turn % len(AGENTS)]
                samples.append(
                    TurnSample(
                        prompt_ids=prefixes[agent] + ids(shape.context if turn else OWN),
                        response_ids=ids(shape.utterance),
                        sampling_logprobs=tuple(-rng.expovariate(0.1) for _ in range(shape.utterance)),
                        advantage=advantage,
                        prefix_key=(scenario, agent),
                        prefix_len=shape.prefix,
                    )
                )
    return Workload(shape, samples)


def separate(samples: Iterable[TurnSample]) -> list[TurnSample]:
    """The same samples with nothing in common."""
    return [replace(sample, prefix_key=(i, "agent1"), prefix_len=0) for i, sample in enumerate(samples)]
