"""The learner's step against an independent computation: unpadded, unpacked, in fp64, from the formulas."""

import math

import pytest
import torch
from helpers import made_up_samples, tiny_llama

from negotiator.config import LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.loss import default_denominator
from negotiator.packing import pack

TEMPERATURE = 0.7


def oracle_gradients(samples, temperature=TEMPERATURE, cap=2.0):
    """DAPO with truncated importance correction at ratio 1: -sum of w A grad(log p) over all tokens / their number."""
    model = tiny_llama().double()
    model.set_attn_implementation("sdpa")
    tokens = sum(len(sample.response_ids) for sample in samples)
    loss = torch.zeros((), dtype=torch.float64)
    for sample in samples:
        ids = torch.tensor(sample.prompt_ids + sample.response_ids)
        rows = model(ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1] / temperature
        logprobs = rows.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]
        sampling = torch.tensor(sample.sampling_logprobs, dtype=torch.float64)
        weight = (logprobs.detach() - sampling).exp().clamp(max=cap)
        ratio = (logprobs - logprobs.detach()).exp()
        loss = loss - (weight * ratio * sample.advantage).sum() / tokens
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


def relative_error(found, expected):
    difference = sum(((found[name].double() - expected[name]) ** 2).sum() for name in expected)
    return math.sqrt(difference / sum((grad**2).sum() for grad in expected.values()))


def new_learner(dtype=torch.float32, **optimizer) -> Learner:
    return Learner(tiny_llama(dtype), OptimizerConfig(**optimizer), LossConfig(), TEMPERATURE)


@pytest.mark.parametrize("max_tokens", [40, 10_000])
def test_gradient_equals_the_oracle(max_tokens):
    samples = made_up_samples()
    expected_loss, expected = oracle_gradients(samples)
    learner = new_learner()
    denominator = default_denominator("dapo", [len(s.response_ids) for s in samples])
    sums = learner.accumulate(learner.passes(pack(samples, max_tokens)), denominator)
    found = {name: master.grad for name, master in learner.masters.items()}
    assert relative_error(found, expected) < 1e-5
    assert sums.loss == pytest.approx(expected_loss, rel=1e-5)


def test_bf16_gradient_is_near_the_oracle_and_accumulates_in_fp32():
    samples = made_up_samples()
    _, expected = oracle_gradients(samples)
    learner = new_learner(torch.bfloat16)
    denominator = default_denominator("dapo", [len(s.response_ids) for s in samples])
    learner.accumulate(learner.passes(pack(samples, 40)), denominator)
    assert all(parameter.grad is None for parameter in learner.model.parameters())
    assert all(master.grad.dtype == torch.float32 for master in learner.masters.values())
    assert relative_error({name: m.grad for name, m in learner.masters.items()}, expected) < 0.05


def test_skipping_samples_without_advantage_changes_no_gradient():
    samples = made_up_samples()
    for index in (1, 5, 6):
        object.__setattr__(samples[index], "advantage", 0.0)
    denominator = default_denominator("dapo", [len(s.response_ids) for s in samples])
    gradients = []
    for kept in (samples, [s for s in samples if s.advantage != 0]):
        learner = new_learner()
        learner.accumulate(learner.passes(pack(kept, 64)), denominator)
        gradients.append({name: master.grad.double() for name, master in learner.masters.items()})
    assert relative_error(gradients[1], gradients[0]) < 1e-6


def test_steps_of_a_tiny_learning_rate_are_not_rounded_away_in_bf16():
    samples = made_up_samples()
    learner = new_learner(torch.bfloat16, lr=1e-6, warmup_steps=0)
    before = {name: master.detach().clone() for name, master in learner.masters.items()}
    for step in range(3):
        learner.step(step, pack(samples, 100), 50.0)
    for name, master in learner.masters.items():
        moved = (master.detach() - before[name]).abs().max()
        assert 1e-6 < moved < 1e-5, name
        assert torch.equal(dict(learner.model.named_parameters())[name], master.bfloat16()), name


def test_warm_up_clipping_and_reported_norm():
    samples = made_up_samples()
    learner = new_learner(lr=1e-3, warmup_steps=4, max_grad_norm=0.01)
    rates = [learner.step(step, pack(samples, 100), 50.0).learning_rate for step in range(6)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])
    fresh = new_learner()
    fresh.accumulate(fresh.passes(pack(samples, 100)), 50.0)
    norm = math.sqrt(sum((m.grad.double() ** 2).sum().item() for m in fresh.masters.values()))
    assert new_learner().step(0, pack(samples, 100), 50.0).grad_norm == pytest.approx(norm, rel=1e-5)


def test_a_step_without_batches_moves_nothing():
    learner = new_learner()
    learner.step(0, pack(made_up_samples(), 100), 50.0)
    before = {name: master.detach().clone() for name, master in learner.masters.items()}
    stats = learner.step(1, [], 50.0)
    assert (stats.loss, stats.grad_norm, stats.computed_tokens) == (0.0, 0.0, 0)
    assert all(torch.equal(before[name], master) for name, master in learner.masters.items())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights():
    learner = new_learner()
    before = {name: master.detach().clone() for name, master in learner.masters.items()}
    samples = made_up_samples()
    object.__setattr__(samples[0], "advantage", float("inf"))
    assert not learner.step(0, pack(samples, 100), 50.0).updated
    assert all(torch.equal(before[name], master) for name, master in learner.masters.items())
    assert not learner.optimizer.state
    assert learner.step(1, pack(made_up_samples(), 100), 50.0).updated  # nothing of it is left in the gradients
