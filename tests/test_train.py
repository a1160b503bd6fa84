"""The real command on a tiny model: what it leaves, how it answers mistakes, and that no end costs anything.

The judges are real.
"""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import Together, metrics
from transformers import AutoModelForCausalLM

from negotiator import guards, train
from negotiator.report.recorder import RunFolder
from negotiator.types import Dialogue, DialogueGroup, PackedBatch, Segment

ROOT = Path(__file__).parent.parent


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "negotiator.train", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def start(folder: Path, *arguments: object) -> Together:
    """The same command, without importing everything again; what it prints goes to `folder`."""
    return Together(train.main, [([*map(str, arguments)],)], folder)


def dialogues_of(folder: Path, step: int) -> list[dict[str, Any]]:
    lines = (folder / "transcripts" / f"step-{step:05d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


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
            "skipped",
        ]
    )
    for row in rows:
        assert promised <= row.keys()
        assert row["failed_dialogues"] == 0
        assert row["logprob_gap"] < 1e-4
        assert 0 < row["cached_prompt_tokens"] < row["prompt_tokens"]
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        seconds = json.loads(line)["seconds"]
        assert sum(seconds.values()) - seconds["step"] == pytest.approx(seconds["step"], rel=0.02)
    assert any(row["grad_norm"] > 0 for row in rows)
    assert any(row["agreement_rate"] > 0 for row in rows)

    dialogues = dialogues_of(folder, 3)
    assert len(dialogues) == 6
    trained = sum(len(u["ids"]) for d in dialogues for u in d["utterances"])
    assert trained == rows[2]["trained_tokens"]
    # What step 3 says comes from the weights after two steps, the newest there are.
    assert {u["weight_version"] for d in dialogues for u in d["utterances"]} == {2}
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [e["step"] for e in evaluations] == [2, 4, 5] and all(e["dialogues"] == 3 for e in evaluations)
    best = max(evaluations, key=lambda e: e["reward"])["step"]  # the first of several
    assert (folder / "checkpoints" / "best").readlink() == Path(f"step-{best}")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"best", f"step-{best}", "step-4", "step-5"}
    held_out = [
        json.loads(line) for line in (folder / "transcripts" / "evaluation-00002.jsonl").read_text().splitlines()
    ]
    assert sum(d["reward"] for d in held_out) / 3 == pytest.approx(evaluations[0]["reward"])
    trained_on = {d["dilemma"] for step in range(1, 6) for d in dialogues_of(folder, step)}
    assert not trained_on & {d["dilemma"] for d in held_out}
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


@pytest.mark.parametrize("ends", [(signal.SIGKILL, signal.SIGKILL), (signal.SIGTERM, signal.SIGKILL)])
def test_ended_anywhere_and_resumed_gives_the_same_run(finished, config_file, tmp_path, ends):
    rng = random.Random(len(set(ends)))
    folder = tmp_path / "ended"
    arguments = ["--config", config_file, "--runs", tmp_path, "--name", "ended"]
    for number, (end, end_after) in enumerate(zip(ends, sorted(rng.sample(range(4), 2)), strict=True)):
        one = start(tmp_path / str(number), *arguments)
        one.wait_for_steps(folder, end_after)
        time.sleep(rng.uniform(0, 0.6))
        one.signal(0, end)
        (code,) = one.wait()
        if end == signal.SIGTERM:
            assert code == 128 + end
            assert (folder / "checkpoints" / f"step-{len(metrics(folder))}").exists()
        arguments = ["--resume", folder]
    if not (folder / "checkpoints" / "step-5").exists():
        last = start(tmp_path / "last", *arguments)
        assert last.wait() == [0], last.printed()
    assert metrics(folder) == metrics(finished[0])
    for name in ("transcripts/step-00001.jsonl", "transcripts/step-00005.jsonl", "evaluations.jsonl"):
        assert (folder / name).read_text() == (finished[0] / name).read_text()


def failing_at_the_third_step(*arguments: str) -> int:
    counted = itertools.count(1)
    guards.too_many_failed = lambda groups, most: "too many" if next(counted) == 3 else ""
    return train.main(arguments)


def test_a_run_that_pauses_keeps_what_it_learned_and_goes_on(finished, config_file, tmp_path):
    arguments = ("--config", str(config_file), "--runs", str(tmp_path), "--name", "paused", "--checkpoint.every", "100")
    paused = Together(failing_at_the_third_step, [(*arguments, "--evaluation.every", "0")], tmp_path / "1")
    assert paused.wait() == [train.PAUSED]
    folder = tmp_path / "paused"
    failed = folder / "transcripts" / "failed-00003.jsonl"
    assert f"step 3 was not done: too many; its dialogues: {failed}; go on with: " in paused.printed()
    assert failed.read_text().count("\n") == 6
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    assert start(tmp_path / "2", "--resume", folder).wait() == [0]
    assert metrics(folder) == metrics(finished[0])


def test_dialogues_that_failed_stop_a_step_by_their_share():
    def group(*failures: str | None) -> DialogueGroup:
        dialogues = [
            Dialogue(None, i, state="failed" if why else "scored", failure=why) for i, why in enumerate(failures)
        ]
        return DialogueGroup(None, dialogues)

    assert guards.too_many_failed([group("a", None), group(None, None)], 0.25) == ""
    told = guards.too_many_failed([group(None, None), group("no answer", "b")], 0.25)
    assert told == "2 of 4 dialogues failed (judge.max_failed is 0.25); the first: no answer"
    assert guards.too_many_failed([group("a", "b")], 1.0) != ""


def test_alone_the_policy_answers_once_and_is_trained_on_that(config_file, tmp_path):
    arguments = ("--config", config_file, "--runs", tmp_path, "--name", "alone", "--mode", "single", "--steps", 2)
    one = start(tmp_path, *arguments, "--loss.beta", 0.04, "--judge.reward", "self")
    assert one.wait() == [0], one.printed()
    for row in metrics(tmp_path / "alone"):
        dialogues = dialogues_of(tmp_path / "alone", row["step"])
        assert len(dialogues) == 6 and all(d["state"] == "scored" and d["rounds"] == 0 for d in dialogues)
        assert all([u["text"] for u in d["utterances"]] == [d["completion"]] for d in dialogues)
        assert row["trained_tokens"] == sum(len(d["utterances"][0]["ids"]) for d in dialogues)
        # All answers to a dilemma share its whole prompt, of which an answer computes the last token itself.
        assert row["computed_tokens"] < 0.6 * row["logical_tokens"]
        assert row["cached_fraction_of_ideal"] == 1
    assert row["grad_norm"] > 0


def test_steps_without_a_finite_loss_are_skipped_and_three_in_a_row_end_the_run(config_file, tmp_path):
    # An entropy bonus that fp32 cannot hold.
    one = start(tmp_path, "--config", config_file, "--runs", tmp_path, "--name", "bad", "--loss.entropy_coef", "1e39")
    assert one.wait() == [1]
    folder = tmp_path / "bad"
    assert (
        f"3 steps in a row had no finite loss and gradient; their batches are in {folder / 'skipped'}" in one.printed()
    )
    assert [(row["skipped"], row["grad_norm"]) for row in metrics(folder)] == [(True, None)] * 3
    kept = load_file(folder / "skipped" / "step-00003.safetensors")
    batches = []
    for number in range(len({name.partition(".")[0] for name in kept})):
        fields = {field.name: kept[f"{number}.{field.name}"] for field in dataclasses.fields(PackedBatch)}
        fields["segments"] = tuple(Segment(*row) for row in fields["segments"].tolist())
        batches.append(PackedBatch(**fields))
    assert sum(int(batch.logical_tokens) for batch in batches) == metrics(folder)[2]["logical_tokens"]
    assert sum(int(batch.mask.sum()) for batch in batches) == metrics(folder)[2]["trained_tokens"]
    moved = [len(list((folder / "checkpoints" / "step-2").glob("trainer/*"))), metrics(folder)[2]["logprob_gap"] < 1e-4]
    assert moved == [1, True]  # the weights stayed good: the third step's dialogues could be sampled and scored


def without_tolerance(*arguments: str) -> int:
    guards.LARGEST_GAP[torch.float32] = 0.0
    return train.main(arguments)


def test_a_first_update_that_cannot_be_right_ends_the_run(config_file, tmp_path):
    arguments = ["--config", str(config_file), "--runs", str(tmp_path)]
    apart = Together(without_tolerance, [(*arguments, "--name", "apart")], tmp_path / "1")
    still = start(tmp_path / "2", *arguments, "--name", "still", "--optimizer.lr", "1.0e-60")
    assert apart.wait() == still.wait() == [1]
    assert "trainer and engine disagree" in apart.printed()
    assert "the first update changed no weight" in still.printed()


def test_gaps_that_rounding_explains_are_none():
    guards.require_agreement(0.03, torch.bfloat16)
    guards.require_agreement(1e-5, torch.float32)
    with pytest.raises(RuntimeError, match="disagree"):
        guards.require_agreement(0.2, torch.bfloat16)


def test_fingerprints_see_one_bit_and_only_what_is_served():
    tensor = torch.ones(5, 7)
    changed = tensor.clone()
    changed[3, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for dtype, differs in ((torch.float32, True), (torch.bfloat16, False)):
        before, after = (guards.fingerprint([("w", each)], dtype) for each in (tensor, changed))
        assert (before != after) == differs


def stopped_twice() -> int:
    with guards.StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.caught == signal.SIGUSR1
        os.kill(os.getpid(), signal.SIGTERM)
    return 0


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    twice = Together(stopped_twice, [()], tmp_path)
    assert twice.wait() == [-signal.SIGTERM]
    assert twice.printed().startswith("SIGUSR1: the run ends after this step")


def test_the_watchdog_shows_where_a_process_stands_still_once(capfd):
    with guards.Watchdog(0.2, "process 7") as dog:
        for _ in range(8):
            time.sleep(0.05)
            dog.moved("walking")
        assert capfd.readouterr().err == ""
        time.sleep(0.6)
    said = capfd.readouterr().err
    assert said.count("process 7: nothing moved for 0 s while walking") == 1
    assert "test_the_watchdog_shows_where" in said


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


def test_two_trainers_never_write_into_one_run(finished, tmp_path):
    held = RunFolder(finished[0])
    second = start(tmp_path, "--resume", finished[0], "--steps", "6")
    assert second.wait() == [2]
    assert "another trainer" in second.printed()
    del held
