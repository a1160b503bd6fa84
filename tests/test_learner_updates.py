"""Several updates on one rollout, and the KL term, against the formulas in fp64: unpacked, step by step."""

import pytest
import torch
from helpers import made_up_samples, tiny_llama

from negotiator.config import LoRAConfig, LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.lora import load_adapted
from negotiator.packing import pack

TEMPERATURE, CLIP, BETA, RATE = 0.7, 0.2, 0.3, 1e-2
SAMPLES = made_up_samples()
TOKENS = sum(len(sample.response_ids) for sample in SAMPLES)
NO_CORRECTION = {"importance": "none", "clip_low": CLIP, "clip_high": CLIP}


def logprobs(model, sample) -> torch.Tensor:
    ids = torch.tensor(sample.prompt_ids + sample.response_ids)
    rows = model(ids[None]).logits[0, len(sample.prompt_ids) - 1 : -1] / TEMPERATURE
    return rows.log_softmax(-1).gather(1, torch.tensor(sample.response_ids)[:, None])[:, 0]


def oracle(updates: int, beta: float) -> dict[str, torch.Tensor]:
    """Weights after `updates` steps of plain gradient descent on DAPO with a k3 term, from the first weights."""
    model = tiny_llama().double()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        first = [logprobs(model, sample) for sample in SAMPLES]
    for _ in range(updates):
        loss = torch.zeros((), dtype=torch.float64)
        for sample, old in zip(SAMPLES, first, strict=True):
            now = logprobs(model, sample)
            ratio = (now - old).exp()
            clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
            distance = old - now  # the first policy is the reference, too
            loss = loss - torch.min(ratio * sample.advantage, clipped * sample.advantage).sum() / TOKENS
            loss = loss + beta * (distance.exp() - distance - 1).sum() / TOKENS
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("max_tokens", [90, 10_000])
def test_three_updates_are_the_oracles(beta, max_tokens):
    loss = LossConfig(**NO_CORRECTION, beta=beta)
    config = OptimizerConfig(updates=3, lr=RATE, warmup_steps=0, max_grad_norm=1e9)
    learner = Learner(tiny_llama(), config, loss, TEMPERATURE, reference=tiny_llama())
    learner.optimizer = torch.optim.SGD(learner.masters.values(), lr=RATE)
    stats = learner.step(0, pack(SAMPLES, max_tokens), TOKENS)
    start = dict(tiny_llama().named_parameters())
    expected, once = oracle(3, beta), oracle(1, beta)
    for name, parameter in learner.model.named_parameters():
        moved, should = parameter.detach().double() - start[name], expected[name] - start[name]
        assert (moved - should).norm() < 1e-3 * should.norm()  # three steps in fp32
        assert (should - (once[name] - start[name]) * 3).norm() > 1e-2 * should.norm(), "no update saw another policy"
    assert stats.clip_fraction > 0 and stats.approx_kl > 0


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path):
    plain = tiny_llama()
    plain.set_attn_implementation("sdpa")
    plain.save_pretrained(tmp_path)
    model = load_adapted(tmp_path, torch.device("cpu"), torch.float32, LoRAConfig(rank=4))
    config = OptimizerConfig(lr=1e-2, warmup_steps=0)
    learner = Learner(model, config, LossConfig(**NO_CORRECTION, beta=BETA), TEMPERATURE)
    distances = []
    for step in range(2):
        with torch.no_grad():
            model.set_attn_implementation("sdpa")
            now = torch.cat([logprobs(model, sample) for sample in SAMPLES])
            base = torch.cat([logprobs(plain, sample) for sample in SAMPLES])
            model.set_attn_implementation("negotiator")
        distances.append(((base - now).exp() - (base - now) - 1).mean())
        found = learner.step(step, pack(SAMPLES, 100), TOKENS).reference_kl
        assert found == pytest.approx(distances[-1].item(), rel=1e-3, abs=1e-9)
    assert distances[0] == 0 and distances[1] > 1e-3
