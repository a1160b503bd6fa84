"""The benchmark of whole steps: its figures are those of real runs, and what no phase covers counts against them."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tiny_run import Together, write_model

from benchmarks import throughput
from benchmarks.throughput import BASE, PHASES, Case, Found, Place, arguments_of, cases, measured, read, tells_apart
from negotiator import advantages, train
from negotiator.data import load_dilemmas
from negotiator.types import Dialogue, DialogueGroup, Persona, Scenario, ScoreVerdict

STEPS = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the local judge."""
    path = tmp_path_factory.mktemp("runs") / "local"
    place = Place(model, torch.device("cpu"), threads=1, steps=STEPS)
    together = Together(train.main, [(arguments_of(Case(BASE["cpu"], "local"), place, path),)], path.parent / "printed")
    assert together.wait() == [0], together.printed()
    return path


@pytest.fixture
def found(folder: Path) -> Found:
    return read(folder, STEPS)


def test_steps_that_count_are_timed_by_another_clock(folder: Path, found: Found) -> None:
    assert [step["step"] for step in found.steps] == [2, 3]  # of four: one is never waited for
    assert found.seconds == pytest.approx(sum(step["seconds"]["step"] for step in found.steps), rel=0.03, abs=0.02)
    texts = [line for n in (2, 3) for line in (folder / "transcripts" / f"step-0000{n}.jsonl").open()]
    dialogues = [json.loads(line) for line in texts]
    assert [len(dialogue["utterances"]) for dialogue in dialogues] == [2] * STEPS * 2 * 2
    assert {dialogue["state"] for dialogue in dialogues} == {"scored"}  # whatever the local judge thinks of them
    spoken = sum(len(utterance["ids"]) for dialogue in dialogues for utterance in dialogue["utterances"])
    row = measured("tiny", "fp32", Case(BASE["cpu"]), found)
    assert row.trained_tokens_per_s == pytest.approx(spoken / found.seconds)
    assert row.generated_tokens_per_s > row.trained_tokens_per_s
    assert row.steps_per_s == pytest.approx(STEPS / found.seconds) == pytest.approx(1 / row.seconds)


def test_phases_explain_the_step_and_gaps_and_overlaps_count_against_them(found: Found) -> None:
    row = measured("tiny", "fp32", Case(BASE["cpu"]), found)
    seconds = {phase: getattr(row, f"{phase}_seconds") for phase in (*PHASES, "other")}
    assert row.explained_fraction >= 0.97
    assert all(seconds[phase] > 0 for phase in PHASES if phase != "evaluation")
    assert sum(seconds.values()) == pytest.approx(row.seconds)
    for step in found.steps:  # by the trainer's own clock, more finely
        told = {**step["seconds"]}
        assert told.pop("step") == pytest.approx(sum(told.values()), rel=0.01)
    for factor in (0, 2):  # a phase that is left out, and one that is counted twice
        steps = [step | {"seconds": {**step["seconds"]}} for step in found.steps]
        for step in steps:
            step["seconds"]["rollout"] *= factor
        wrong = measured("tiny", "fp32", Case(BASE["cpu"]), found._replace(steps=steps))
        share = seconds["rollout"] / row.seconds
        assert wrong.explained_fraction == pytest.approx(1 - share, abs=0.03)
        assert wrong.other_seconds == pytest.approx((1 - factor) * seconds["rollout"], abs=0.03 * row.seconds)


def test_a_phase_that_is_not_told_is_noticed(found: Found) -> None:
    found.steps[0]["seconds"]["lunch"] = 0.1
    with pytest.raises(AssertionError, match="not told"):
        measured("tiny", "fp32", Case(BASE["cpu"]), found)


def test_shapes_differ_from_the_first_in_one_thing() -> None:
    base = BASE["cpu"]
    assert cases(base, 2, quick=True) == [Case(base), Case(base, processes=2)]
    first, *others = cases(base, 2, quick=False)
    assert first == Case(base)
    assert len({first, *others}) == len(others) + 1
    for case in others:
        changed = [name for name in ("judge", "processes") if getattr(case, name) != getattr(first, name)]
        changed += [name for name in base._fields if getattr(case.shape, name) != getattr(base, name)]
        assert len(changed) == 1, case
    assert {case.shape.group for case in others} == {2, 4, 8}


def test_the_command_alone_and_under_torchrun(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--quick", "--model", str(model), "--device", "cpu", "--out", str(tmp_path)]) == 0
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    (path,) = tmp_path.glob("throughput-quick-*.csv")
    one, two = csv.DictReader(path.read_text().splitlines())
    assert [one["processes"], two["processes"]] == ["1", "2"]
    for name in ("steps_per_s", "trained_tokens_per_s", "generated_tokens_per_s"):
        assert figures[name] == float(one[name]) > 0
    assert figures["explained_fraction"] == min(float(row["explained_fraction"]) for row in (one, two)) >= 0.97
    assert figures["scaling"] == pytest.approx(float(two["steps_per_s"]) / float(one["steps_per_s"]))
    assert path.with_suffix(".png").stat().st_size > 10_000
    running = [process.info["cmdline"] or () for process in psutil.process_iter(["cmdline"])]
    assert not any(str(model) in command for command in running)


def test_every_made_up_reward_trains() -> None:
    scenario = Scenario(0, load_dilemmas()[0], *(Persona(name, "") for name in "AB"), "")
    for group in (case.shape.group for base in BASE.values() for case in cases(base, 2, quick=False)):
        dialogues = [Dialogue(scenario, index, state="scored") for index in range(group)]
        for dialogue in dialogues:
            dialogue.score = ScoreVerdict(tells_apart(scenario, dialogue))
        advantages.assign([DialogueGroup(scenario, dialogues)])
        assert all(dialogue.advantage for dialogue in dialogues)


def test_a_trainer_that_ends_or_gets_nowhere_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert throughput._wait(trainer, tmp_path / "metrics.jsonl", 1) == "the trainer ended with exit code 3"
    monkeypatch.setattr(throughput, "RUN_LIMIT_S", 0.5)
    trainer = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & wait"])
    why = throughput._wait(trainer, tmp_path / "metrics.jsonl", 1)
    assert why is not None
    assert "had not done its steps after" in why
    (child,) = psutil.Process(trainer.pid).children()
    throughput._end(trainer)
    assert trainer.returncode == -signal.SIGKILL
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    assert throughput.main(["--processes", "3", "--device", "cpu"]) == 2
    assert "--processes must be from 1 to 2" in capsys.readouterr().err
