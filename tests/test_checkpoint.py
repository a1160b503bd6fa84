"""Checkpoints: training goes on bit for bit where it stopped, and Hugging Face reads them."""

import pytest
import torch
from helpers import SMOLLM2, made_up_samples, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from negotiator import checkpoint
from negotiator.config import LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.models import load_model
from negotiator.packing import pack

DTYPES = [torch.float32, torch.bfloat16]


def new_learner(model) -> Learner:
    return Learner(model, OptimizerConfig(lr=1e-3, warmup_steps=3, weight_decay=0.1), LossConfig(), 0.7)


def step(learner: Learner, number: int) -> None:
    learner.step(number, pack(made_up_samples(seed=number), 100), 60.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_resumed_weights_and_moments_are_identical(tmp_path, tokenizer, dtype, steps_before):
    straight = new_learner(tiny_llama(dtype))
    for number in range(4):
        if number == steps_before:
            path = checkpoint.save(tmp_path, number, straight, tokenizer, keep=2)
        step(straight, number)

    assert checkpoint.newest(tmp_path) == (steps_before, path)
    resumed = new_learner(load_model(path, torch.device("cpu"), dtype))
    checkpoint.load_trainer(path, resumed)
    for number in range(steps_before, 4):
        step(resumed, number)
    for name, master in straight.masters.items():
        assert torch.equal(master, resumed.masters[name]), name
        assert torch.equal(
            straight.optimizer.state[master]["exp_avg_sq"], resumed.optimizer.state[resumed.masters[name]]["exp_avg_sq"]
        )


def test_hugging_face_reads_it_and_computes_the_same(tmp_path, tokenizer):
    learner = new_learner(tiny_llama())
    step(learner, 0)
    path = checkpoint.save(tmp_path, 1, learner, tokenizer, keep=1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert model.config._attn_implementation != "negotiator"
    assert all(torch.equal(p, learner.masters[name]) for name, p in model.named_parameters())
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
    assert AutoTokenizer.from_pretrained(path)("Hello there").input_ids == tokenizer("Hello there").input_ids


def test_rotation_keeps_the_newest_and_ignores_what_a_kill_left(tmp_path, tokenizer):
    learner = new_learner(tiny_llama())
    (tmp_path / "step-9.partial").mkdir(parents=True)
    (tmp_path / "step-9.partial" / "model.safetensors").write_bytes(b"torn")
    assert checkpoint.newest(tmp_path) is None
    for done in (2, 4, 10):
        checkpoint.save(tmp_path, done, learner, tokenizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-4"]
    assert checkpoint.newest(tmp_path) == (10, tmp_path / "step-10")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tokenizer):
    learner = new_learner(tiny_llama())
    step(learner, 0)
    path = checkpoint.save(tmp_path, 1, learner, tokenizer, keep=1)
    with pytest.raises(ValueError, match="another model"):
        checkpoint.load_trainer(path, new_learner(tiny_llama(tied=False)))
