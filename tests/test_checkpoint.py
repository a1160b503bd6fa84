"""Checkpoints: training goes on bit for bit where it stopped, and Hugging Face reads them."""

import resource
import threading

import pytest
import torch
from helpers import SMOLLM2, made_up_samples, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from negotiator import checkpoint
from negotiator.checkpoint import Checkpoints
from negotiator.config import LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.models import load_model
from negotiator.packing import pack

DTYPES = [torch.float32, torch.bfloat16]


def new_learner(model) -> Learner:
    return Learner(model, OptimizerConfig(lr=1e-3, warmup_steps=3, weight_decay=0.1), LossConfig(), 0.7)


def save(folder, steps_done: int, learner: Learner, tokenizer, keep: int = 2):
    with Checkpoints(folder, learner, tokenizer, learner.model.dtype, keep) as saves:
        saves.save(steps_done)
    return folder / f"step-{steps_done}"


def step(learner: Learner, number: int) -> None:
    learner.step(number, pack(made_up_samples(seed=number), 100), 60.0)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_resumed_weights_and_moments_are_identical(tmp_path, tokenizer, dtype, steps_before):
    straight, trained_on = new_learner(tiny_llama(dtype)), threading.Event()
    with Checkpoints(tmp_path, straight, tokenizer, dtype, keep=2) as saves:
        for number in range(4):
            if number == steps_before:
                copied = {name: parameter.clone() for name, parameter in straight.model.named_parameters()}
                saves._thread.submit(trained_on.wait)  # so that no file is written before
                saves.save(number)
            step(straight, number)
        assert checkpoint.newest(tmp_path) is None
        trained_on.set()

    path = tmp_path / f"step-{steps_before}"
    assert checkpoint.newest(tmp_path) == (steps_before, path)
    resumed = new_learner(load_model(path, torch.device("cpu"), dtype))
    assert all(torch.equal(parameter, copied[name]) for name, parameter in resumed.model.named_parameters())
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
    path = save(tmp_path, 1, learner, tokenizer)
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
        save(tmp_path, done, learner, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-4"]
    assert checkpoint.newest(tmp_path) == (10, tmp_path / "step-10")


def test_a_checkpoint_of_another_model_is_refused(tmp_path, tokenizer):
    learner = new_learner(tiny_llama())
    step(learner, 0)
    path = save(tmp_path, 1, learner, tokenizer)
    with pytest.raises(ValueError, match="another model"):
        checkpoint.load_trainer(path, new_learner(tiny_llama(tied=False)))


@pytest.mark.parametrize("room", [2**15, 2**20], ids=["trainer", "export"])
def test_a_full_disk_costs_the_checkpoint_being_written_and_no_other(tmp_path, tokenizer, room):
    learner = new_learner(tiny_llama())
    step(learner, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, learner, tokenizer, torch.float32, keep=1) as saves:
        saves.save(1)
        saves.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # files cannot grow beyond it
        try:
            saves.save(2)
            with pytest.raises(RuntimeError, match=r"step 2 was not written .*newest whole one is .*step-1"):
                saves.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
        saves.save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_a_failure_is_told_when_the_run_ends_and_hides_no_other(tmp_path, tokenizer):
    learner = new_learner(tiny_llama())
    (tmp_path / "step-1" / "in the way").mkdir(parents=True)
    with pytest.raises(RuntimeError, match="step 1 was not written"):
        save(tmp_path, 1, learner, tokenizer)
    with pytest.raises(KeyError) as caught, Checkpoints(tmp_path, learner, tokenizer, torch.float32, 1) as saves:
        saves.save(1)
        raise KeyError("the first thing that went wrong")
    assert "step 1 was not written" in caught.value.__notes__[0]


def test_nothing_is_pickled(tmp_path, tokenizer):
    learner = new_learner(tiny_llama())
    step(learner, 0)
    kinds = {path.suffix for path in save(tmp_path, 1, learner, tokenizer).rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".jinja"}
