"""Several processes against one: the same losses and weights, checkpoints that fit any number, one end for all."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SMOLLM2, made_up_samples, tiny_llama
from safetensors.torch import load_file, save_file
from scripted_sglang import ScriptedServer
from tiny_run import PATIENCE_S, Together, metrics
from transformers import AutoTokenizer

from negotiator import guards, parallel, train
from negotiator.checkpoint import Checkpoints, load_trainer
from negotiator.config import LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.models import load_model
from negotiator.packing import pack
from negotiator.parallel import ALONE, Sharding, World

STEPS, SAVED = 5, 2
ROOT = Path(__file__).parent.parent


def new_learner(world: World, model, dtype: torch.dtype) -> Learner:
    sharding = Sharding(world, dtype) if world.size > 1 else None
    return Learner(model, OptimizerConfig(lr=1e-3, warmup_steps=3, weight_decay=0.1), LossConfig(), 0.7, sharding)


def learn(learner: Learner, first: int, last: int) -> list[float]:
    samples = [made_up_samples(seed=step) for step in range(last)]
    batches = [pack(samples[step], 100, learner.world.size) for step in range(first, last)]
    return [learner.step(first + number, each, 60.0).loss for number, each in enumerate(batches)]


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.weights()}


def straight(world: World, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[list[float], Learner]:
    """All steps, with a checkpoint in the middle, which is being written while the others are done."""
    learner = new_learner(world, tiny_llama(torch.float32 if world.size > 1 else dtype), dtype)
    losses = learn(learner, 0, SAVED)
    with Checkpoints(folder, learner, AutoTokenizer.from_pretrained(SMOLLM2), dtype, keep=1) as saves:
        saves.save(SAVED)
        losses += learn(learner, SAVED, STEPS)
    return losses, learner


def resumed(world: World, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / f"step-{SAVED}"
    learner = new_learner(world, load_model(path, torch.device("cpu"), torch.float32), torch.float32)
    load_trainer(path, learner)
    learn(learner, SAVED, STEPS)
    return weights(learner)


def one_of_many(folder: Path, others: list[int]) -> int:
    """What each process does: a run of its own, and the second half of those of `others`."""
    world = parallel.join(60.0)
    losses, learner = straight(world, folder / f"saved-{world.size}")
    found = {"losses": torch.tensor(losses, dtype=torch.float64), **weights(learner)}
    for size in others:
        found |= {f"from-{size}.{name}": tensor for name, tensor in resumed(world, folder / f"saved-{size}").items()}
    straight(world, folder / f"bf16-{world.size}", torch.bfloat16)
    if world.leads:
        save_file(found, folder / f"found-{world.size}.safetensors")
    parallel.leave(world)
    return 0


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(losses, weights) of one process, everything that 2 and 4 found, and the folder."""
    folder = tmp_path_factory.mktemp("learned")
    losses, learner = straight(ALONE, folder / "saved-1")
    found = {}
    for size, others in ((2, [1, 2]), (4, [2])):
        together = Together(one_of_many, [(folder, others)] * size, folder / f"printed-{size}")
        assert together.wait() == [0] * size, together.printed()
        found[size] = load_file(folder / f"found-{size}.safetensors")
    return losses, weights(learner), found, folder


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], prefix: str = "") -> float:
    """Of all weights together, relative."""
    difference = sum(((found[prefix + name] - tensor) ** 2).sum().item() for name, tensor in expected.items())
    return (difference / sum((tensor**2).sum().item() for tensor in expected.values())) ** 0.5


@pytest.mark.parametrize("size", [2, 4])
def test_many_processes_learn_what_one_learns(results, size):
    losses, expected, found, _ = results
    assert found[size]["losses"].tolist() == pytest.approx(losses, rel=1e-5)
    assert distance(found[size], expected) < 1e-5


def test_a_checkpoint_goes_on_with_any_number_of_processes(results):
    _, expected, found, folder = results
    assert distance(found[2], expected, "from-1.") < 1e-5
    assert distance(found[4], expected, "from-2.") < 1e-5
    for size in (2, 4):
        assert distance(resumed(ALONE, folder / f"saved-{size}"), expected) < 1e-5
    for name in expected:  # on as many as before, bit for bit
        assert torch.equal(found[2][f"from-2.{name}"], found[2][name]), name


def test_sharded_masters_become_those_of_a_bf16_model(results):
    path = results[3] / "bf16-2" / f"step-{SAVED}"
    exported = load_file(path / "model.safetensors")
    learner = new_learner(ALONE, tiny_llama(torch.bfloat16), torch.bfloat16)
    load_trainer(path, learner)
    assert all(tensor.dtype == torch.bfloat16 for tensor in exported.values())
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(parameter, exported[name]), name
        assert torch.equal(parameter, learner.masters[name].bfloat16()), name
        assert not torch.equal(learner.masters[name], parameter.float()), name  # finer than what is exported


def test_a_checkpoint_without_the_files_of_a_process_is_refused(results, tmp_path):
    source = results[3] / "saved-4" / f"step-{SAVED}"
    path = source.rename(tmp_path / "torn")
    (missing,) = path.glob("trainer/shard-00003-*")
    missing.unlink()
    with pytest.raises(ValueError, match="lacks parts"):
        load_trainer(path, new_learner(ALONE, load_model(path, torch.device("cpu"), torch.float32), torch.float32))


def start(folder: Path, *arguments: object, own: tuple[object, ...] = ()) -> Together:
    """The command in two processes, the second with arguments of its `own` besides."""
    first = [str(argument) for argument in arguments]
    return Together(train.main, [(first,), ([*first, *map(str, own)],)], folder)


def test_the_command_with_two_processes_whatever_ends_them(config_file, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = ["--config", config_file, "--runs", tmp_path, "--steps", "5"]
    command = [*launch, "-m", "negotiator.train", *arguments, "--name", "whole"]
    whole = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.count("example dialogue") == whole.stdout.count("step    5/5") == 1

    folder = tmp_path / "ended"
    asked = start(tmp_path / "asked", *arguments, "--name", "ended")
    asked.wait_for_steps(folder, 1)
    asked.signal(1, signal.SIGUSR1)  # whoever gets it
    assert asked.wait() == [128 + signal.SIGUSR1] * 2
    done = len(metrics(folder))
    assert done < 5
    assert (folder / "checkpoints" / f"step-{done}").exists()
    assert f"SIGUSR1: stopped and saved; go on with: python -m negotiator.train --resume {folder}" in asked.printed()
    assert "stopped" not in asked.printed(1)

    broken = start(tmp_path / "broken", "--resume", folder)
    broken.wait_for_steps(folder, done + 1)
    time.sleep(random.Random(0).uniform(0, 0.3))
    broken.signal(1, signal.SIGKILL)
    assert broken.wait() == [1, -signal.SIGKILL]  # the other one does not wait for ever
    assert "stopped early; go on with" in broken.printed()

    again = start(tmp_path / "again", "--resume", folder)
    assert again.wait() == [0, 0], again.printed()
    assert metrics(folder) == metrics(tmp_path / "whole")


def test_a_mistake_is_told_once_and_by_whoever_made_it(config_file, tmp_path):
    shared = start(tmp_path / "shared", "--config", config_file, "--runs", tmp_path, "--model.path", "nowhere")
    assert shared.wait() == [2, 2]
    assert shared.printed().startswith("error: no model at nowhere")
    assert shared.printed(1) == ""

    usage = start(tmp_path / "usage", "--config", config_file, "--speed", "1")
    assert usage.wait() == [2, 2]
    assert "unrecognized arguments" in usage.printed()
    assert usage.printed(1) == ""

    own = start(tmp_path / "own", "--config", config_file, "--runs", tmp_path, own=("--model.path", "nowhere"))
    own.processes[1].join(PATIENCE_S)
    own.kill()
    assert own.processes[1].exitcode == 2
    assert "process 1: error: no model at nowhere" in own.printed(1)


def with_made_up_logprobs(*arguments: str) -> int:
    guards.LARGEST_GAP[torch.float32] = 1e9  # those of a scripted server are no model's
    return train.main(arguments)


def test_servers_that_all_processes_share_are_the_leaders(config_file, tmp_path):
    server = ScriptedServer()
    rewards = ("--judge.agreement", "negotiator.judges.rewards:after_a_round", "--judge.reward", f"{__name__}:letters")
    served = ("--engine.kind", "sglang", "--engine.urls", f"[{server.url}]", "--engine.sync", "tensor", "--steps", "2")
    arguments = [*map(str, ("--config", config_file, "--runs", tmp_path, "--name", "served")), *rewards, *served]
    both = Together(with_made_up_logprobs, [arguments] * 2, tmp_path / "served-output")
    try:
        assert both.wait() == [0, 0], both.printed()
        assert not server.misused
        assert server.version == "2"
        saved = load_file(tmp_path / "served" / "checkpoints" / "step-2" / "model.safetensors")
        assert all(torch.equal(server.weights[name], tensor) for name, tensor in saved.items())
    finally:
        server.stop()
    assert len(metrics(tmp_path / "served")) == 2


def letters(scenario, dialogue) -> float:
    return sum(len(utterance.text) for utterance in dialogue.utterances) % 6
