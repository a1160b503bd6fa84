"""The real command on a tiny model: what it leaves, how it answers mistakes, and that a kill costs nothing.

The model is random (its dialogues are gibberish), the tokenizer and chat template are SmolLM2's, the judges are real.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from negotiator import train
from negotiator.report.recorder import RunFolder

ROOT = Path(__file__).parent.parent
NOT_REPRODUCED = ("seconds", "tokens_per_s")  # they depend on the clock


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> Path:
    """Random weights small enough that its next token is nearly uniform: agreement and scores then vary by chance."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.3,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config_file(tiny_model, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    config = {
        "steps": 5,
        "model": {"path": str(tiny_model), "dtype": "fp32", "device": "cpu"},
        "dialogue": {"max_rounds": 2, "max_tokens": 12, "completion_max_tokens": 12},
        "rollout": {"scenarios": 2, "group_size": 3},
        "engine": {"cache_tokens": 4096},
        "judge": {"agreement": "local", "reward": "local"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "micro_batch_tokens": 1024},
        "checkpoint": {"every": 2, "keep": 2},
    }
    file.write_text(yaml.safe_dump(config))
    return file


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "negotiator.train", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    result = run("--config", config_file, "--runs", runs, "--name", "whole")
    assert result.returncode == 0, result.stderr
    return runs / "whole", result.stdout


def test_a_run_leaves_what_it_promises(finished):
    folder, printed = finished
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    promised = set(
        [
            "step",
            "reward_mean",
            "reward_std",
            "agreement_rate",
            "rounds_mean",
            "zero_variance_groups",
            "failed_dialogues",
            "trained_tokens",
            "generated_tokens",
            "cached_prompt_tokens",
            "loss",
            "grad_norm",
            "logprob_gap",
            "seconds",
        ]
    )
    for row in rows:
        assert promised <= row.keys()
        assert row["failed_dialogues"] == 0
        assert row["logprob_gap"] < 1e-4
        assert 0 < row["cached_prompt_tokens"] < row["prompt_tokens"]
        assert sum(row["seconds"].values()) - row["seconds"]["step"] == pytest.approx(row["seconds"]["step"], rel=0.02)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert any(row["agreement_rate"] > 0 for row in rows)

    dialogues = [json.loads(line) for line in (folder / "transcripts" / "step-00003.jsonl").read_text().splitlines()]
    assert len(dialogues) == 6
    trained = sum(len(u["ids"]) for d in dialogues for u in d["utterances"])
    assert trained == rows[2]["trained_tokens"]
    # What step 3 says comes from the weights after two steps, the newest there are.
    assert {u["weight_version"] for d in dialogues for u in d["utterances"]} == {2}
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-4", "step-5"]
    assert yaml.safe_load((folder / "config.yaml").read_text())["rollout"]["group_size"] == 3
    assert str(folder) in printed
    assert "example dialogue" in printed
    assert "step    5/5" in printed
    assert "step    5/5" in (folder / "log.txt").read_text()


def test_trained_weights_moved_and_load_elsewhere(finished, tiny_model):
    before = AutoModelForCausalLM.from_pretrained(tiny_model)
    after = AutoModelForCausalLM.from_pretrained(finished[0] / "checkpoints" / "step-5")
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("seed", [0, 1])
def test_killed_anywhere_and_resumed_gives_the_same_run(finished, config_file, tmp_path, seed):
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    arguments = ["--config", config_file, "--runs", tmp_path, "--name", "killed"]
    for kill_after in sorted(rng.sample(range(5), 2)):
        process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not (folder / "config.yaml").exists() or _lines(folder) < kill_after:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run got no further"
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        arguments = ["--resume", folder]
    if not (folder / "checkpoints" / "step-5").exists():
        assert run(*arguments).returncode == 0
    whole, resumed = metrics(finished[0]), metrics(folder)
    for row in whole + resumed:
        for key in NOT_REPRODUCED:
            del row[key]
    assert resumed == whole
    for name in ("step-00001.jsonl", "step-00005.jsonl"):
        ours = (folder / "transcripts" / name).read_text()
        assert ours == (finished[0] / "transcripts" / name).read_text()


def _lines(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_dry_run_prints_the_plan_and_writes_nothing(config_file, tmp_path):
    result = run("--config", config_file, "--runs", tmp_path / "runs", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "memory in all" in result.stdout
    assert yaml.safe_load(result.stdout.split("\nplan")[0])["steps"] == 5
    assert not (tmp_path / "runs").exists()


def test_a_mistake_is_one_sentence_exit_code_2_and_nothing_written(finished, config_file, tmp_path, capsys):
    bad_data = tmp_path / "bad.jsonl"
    bad_data.write_text('{"id": "a", "text": "What now?"}\n{"id": "b"}\n')
    runs = tmp_path / "runs"
    base = ["--config", config_file, "--runs", runs]
    cases = [
        ([*base, "--optimizer.speed", "1"], "unrecognized arguments: --optimizer.speed"),
        ([*base, "--rollout.group_size", "1"], "rollout.group_size"),
        ([*base, "--model.path", tmp_path / "nothing"], "no model at"),
        ([*base, "--data.dilemmas", bad_data], "bad.jsonl:2"),
        ([*base, "--judge.reward", "nosuchmodule:reward"], "nosuchmodule"),
        ([*base, "--dialogue.max_tokens", "1000"], "context is 2,048"),
        ([*base, "--engine.cache_tokens", "1000000000000"], "GiB are available"),
        (["--resume", tmp_path], "not a run folder"),
        (["--resume", finished[0]], "already done 5 steps"),
        (["--config", config_file, "--runs", finished[0].parent, "--name", "whole"], "already holds a run"),
    ]
    for arguments, says in cases:
        with pytest.raises(SystemExit) as caught:  # what `python -m` does with the exit code
            sys.exit(train.main([str(argument) for argument in arguments]))
        printed = capsys.readouterr().err
        assert caught.value.code == 2, (arguments, printed)
        assert says in printed, (arguments, printed)
        assert printed.startswith("error: ")
        assert printed.count("\n") == 1
    assert not runs.exists()


def test_two_trainers_never_write_into_one_run(finished):
    held = RunFolder(finished[0])
    result = run("--resume", finished[0], "--steps", "6")
    assert result.returncode == 2
    assert "another trainer" in result.stderr
    del held
