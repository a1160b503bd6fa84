"""One real step, SmolLM2 and all: what the trainer computes over real dialogues against an independent computation."""

import asyncio
import math
from pathlib import Path

import torch
from helpers import SMOLLM2
from transformers import AutoModelForCausalLM

from negotiator import advantages, rollout
from negotiator.attention import PackedLayout
from negotiator.config import Config, load_config
from negotiator.data import draw_scenarios, load_dilemmas, load_personas
from negotiator.loss import token_logprobs
from negotiator.packing import pack, turn_samples
from negotiator.setup import Run, check, prepare
from negotiator.types import DialogueGroup, TurnSample


def prepared(dtype: str, **overrides) -> tuple[Config, Run]:
    rewards = {"judge.agreement": "negotiator.judges.rewards:after_a_round", "judge.reward": f"{__name__}:length"}
    sizes = {"dialogue.max_tokens": 12, "dialogue.max_rounds": 1, "dialogue.completion_max_tokens": 4}
    settings = {"model.path": str(SMOLLM2), "model.dtype": dtype, "model.device": "cpu", "engine.cache_tokens": 4096}
    config = load_config(None, settings | rewards | sizes | overrides)
    return config, prepare(check(config), None, Path())


def length(scenario, dialogue) -> float:
    """A reward that differs between dialogues."""
    return sum(len(utterance.text) for utterance in dialogue.utterances) % 6


def negotiate(run: Run, scenarios: int, group_size: int) -> list[DialogueGroup]:
    drawn = draw_scenarios(load_dilemmas(), load_personas(), seed=3, step=0, count=scenarios)
    groups = asyncio.run(rollout.run(run.table, 0, drawn, group_size))
    advantages.assign(groups)
    return groups


def oracle(samples: list[TurnSample], temperature: float) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probs by sample and gradients by parameter, each sample alone through Hugging Face's own forward in fp64."""
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float64)
    tokens = sum(len(sample.response_ids) for sample in samples)
    logprobs = []
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        rows = model(ids).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
        chosen = rows.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        weight = (chosen.detach() - torch.tensor(sample.sampling_logprobs, dtype=torch.float64)).exp()
        (-(weight * chosen * sample.advantage).sum() / tokens).backward()
        logprobs.append(chosen.detach())
    return logprobs, {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_and_log_probs_of_real_dialogues_equal_fp64_without_packing():
    config, run = prepared("fp32")
    samples = turn_samples(negotiate(run, scenarios=1, group_size=2), "both")
    assert len(samples) == 4
    assert all(sample.advantage for sample in samples)
    logprobs, expected = oracle(samples, config.dialogue.temperature)

    for sample, exact in zip(samples, logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(sample.sampling_logprobs).double(), exact, atol=1e-4, rtol=0)
    tokens = sum(len(sample.response_ids) for sample in samples)
    sums = run.learner.accumulate(run.learner.passes(pack(samples, 512)), denominator=tokens)
    assert sums.gap / sums.tokens < 1e-4
    error = sum(((run.learner.masters[name].grad - exact) ** 2).sum() for name, exact in expected.items())
    assert math.sqrt(error / sum((exact**2).sum() for exact in expected.values())) < 1e-4


def test_log_prob_gap_in_bf16():
    config, run = prepared("bf16", **{"dialogue.max_tokens": 32})
    samples = turn_samples(negotiate(run, scenarios=2, group_size=2), "both")
    gaps = []
    for batch in pack(samples, 1024):
        with torch.no_grad():
            hidden = run.learner.model.get_decoder()(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                layout=PackedLayout(batch.segments),
                use_cache=False,
            ).last_hidden_state[0]
            head = run.learner.model.get_output_embeddings().weight
        logprobs, _ = token_logprobs(hidden, head, batch.targets, batch.mask, config.dialogue.temperature)
        gaps.append((logprobs - batch.sampling_logprobs)[batch.mask].abs())
    gap = torch.cat(gaps)
    assert len(gap) > 100
    assert 0 < gap.mean() < 0.04


def test_dialogues_of_a_group_differ_and_their_seed_repeats_them():
    spoken = []
    for _ in range(2):
        _, run = prepared("fp32")
        group = negotiate(run, scenarios=1, group_size=3)[0]
        spoken.append([dialogue.utterances[0].generation.ids for dialogue in group.dialogues])
    assert len(set(spoken[0])) == 3
    assert spoken[0] == spoken[1]
