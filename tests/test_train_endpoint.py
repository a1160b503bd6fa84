"""Whole runs on a tiny model, judged by an endpoint: repeated from what was recorded, paused and resumed."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from misbehaving_endpoint import Answer, MisbehavingEndpoint, Received, says
from tiny_run import Together, metrics

from negotiator import train


def verdict(number: int, received: Received) -> Answer:
    """By chance, but the same for the same texts, and with the code of the instructions."""
    system = received.body["messages"][0]["content"]
    code = re.search(r'"code": "(\w+)"', system)
    assert code is not None
    chance = int(hashlib.sha256(received.user.encode()).hexdigest(), 16)
    said = {"agree": chance % 2 == 0} if '"agree"' in system else {"score": chance % 6}
    return says(json.dumps({"code": code[1], **said}), after_s=0.05)  # so that several are under way


@pytest.fixture
def endpoint() -> Iterator[MisbehavingEndpoint]:
    endpoint = MisbehavingEndpoint(verdict)
    yield endpoint
    endpoint.close()


def run(folder: Path, *arguments: object) -> tuple[int, str]:
    one = Together(train.main, [([*map(str, arguments)],)], folder)
    (code,) = one.wait()
    return code, one.printed()


def judged_by(url: str, config_file: Path, runs: Path) -> list[Any]:
    judges = ["--judge.agreement", "openai", "--judge.reward", "openai", "--judge.url", url, "--judge.name", "m"]
    return ["--config", config_file, "--runs", runs, "--steps", 3, *judges, "--judge.hedge", "false"]


def learned(folder: Path) -> list[dict[str, Any]]:
    """All figures but how much of a prompt was cached, which depends on when verdicts come."""
    return [{k: v for k, v in row.items() if not k.startswith("cached_")} for row in metrics(folder)]


def test_a_run_repeated_with_its_verdicts_asks_nobody_and_is_the_same(endpoint, config_file, tmp_path):
    arguments = [*judged_by(endpoint.url, config_file, tmp_path), "--judge.cache", tmp_path / "verdicts"]
    assert run(tmp_path / "1", *arguments, "--name", "first")[0] == 0
    asked = len(endpoint.received)
    first = learned(tmp_path / "first")
    assert asked > 0 and {row["agreement_rate"] for row in first} != {0.0}
    assert run(tmp_path / "2", *arguments, "--name", "again")[0] == 0
    assert len(endpoint.received) == asked
    assert run(tmp_path / "3", *arguments, "--name", "replayed", "--judge.replay", "true")[0] == 0
    assert len(endpoint.received) == asked
    assert learned(tmp_path / "again") == learned(tmp_path / "replayed") == first


def test_a_spent_budget_pauses_a_run_that_goes_on_where_it_was_with_nothing_paid_twice(endpoint, config_file, tmp_path):
    arguments = [*judged_by(endpoint.url, config_file, tmp_path), "--evaluation.every", 0]
    assert run(tmp_path / "1", *arguments, "--name", "free")[0] == 0
    all_calls = len(endpoint.received)
    code, printed = run(tmp_path / "2", *arguments, "--name", "poor", "--judge.max_calls", all_calls // 2)
    assert code == train.PAUSED
    assert "the budget is spent" in printed and "go on with: python -m negotiator.train --resume" in printed
    assert len(endpoint.received) == all_calls + all_calls // 2
    code, printed = run(tmp_path / "3", "--resume", tmp_path / "poor", "--judge.max_calls", 10 * all_calls)
    assert code == 0, printed
    assert learned(tmp_path / "poor") == learned(tmp_path / "free")
    assert len(endpoint.received) == 2 * all_calls


def test_a_step_without_verdicts_is_not_done_and_says_why(config_file, tmp_path):
    broken = MisbehavingEndpoint(lambda number, received: Answer("", 500))
    arguments = [*judged_by(broken.url, config_file, tmp_path), "--judge.retries", 0, "--name", "broken"]
    code, printed = run(tmp_path / "1", *arguments)
    broken.close()
    assert code == train.PAUSED
    assert "6 of 6 dialogues failed" in printed and "agreement judge: HTTP 500" in printed
    assert not (tmp_path / "broken" / "metrics.jsonl").exists()
