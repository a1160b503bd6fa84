"""`python -m negotiator.judges quality`, and the figures it gives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from misbehaving_endpoint import Answer, MisbehavingEndpoint, Received, says

from negotiator.judges.__main__ import main
from negotiator.judges.figures import calibration_error, cohen_kappa, kendall_tau_b, reliability, spearman

# --- figures ---


def test_kappa_is_agreement_beyond_chance() -> None:
    yes_no = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    first, second = zip(*yes_no, strict=True)
    assert cohen_kappa(first, second) == pytest.approx(0.4)  # the textbook's 20, 5, 10, 15: (0.7 - 0.5) / (1 - 0.5)
    assert cohen_kappa([True, False], [False, True]) == -1
    assert cohen_kappa([True, True], [True, True]) is None and cohen_kappa([], []) is None


def test_rank_correlations_with_ties() -> None:
    # Worked out by hand: ranks 0, 1.5, 1.5, 3 against 0, 2, 1, 3; five of six pairs are untied in the first.
    first, second = [1.0, 2.0, 2.0, 4.0], [10.0, 30.0, 20.0, 90.0]
    assert spearman(first, second) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert kendall_tau_b(first, second) == pytest.approx(5 / math.sqrt(5 * 6))
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1) and kendall_tau_b([1, 2, 3], [3, 2, 1]) == -1
    assert kendall_tau_b([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    for constant in ([], [2.0], [2.0, 2.0]):
        assert spearman(constant, constant) is None and kendall_tau_b(constant, constant) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=9), st.randoms())
def test_correlations_know_only_ranks_and_pairs(pairs: list[tuple[int, int]], random: Any) -> None:
    first, second = zip(*pairs, strict=True)
    shuffled = random.sample(pairs, len(pairs))
    for correlation in (spearman, kendall_tau_b):
        value = correlation(first, second)
        stretched = correlation([math.exp(a) for a in first], [5 * b for b in second])
        again = correlation(*zip(*shuffled, strict=True))
        if value is None:
            assert stretched is None and again is None
        else:
            assert -1 - 1e-9 <= value <= 1 + 1e-9
            assert stretched == pytest.approx(value) and again == pytest.approx(value)
            assert correlation(second, first) == pytest.approx(value)
            assert correlation([-a for a in first], second) == pytest.approx(-value)


def test_reliability_table_and_its_error() -> None:
    bins = reliability([0.0, 0.1, 0.1, 0.6, 1.0], [0.0, 1.0, 0.0, 1.0, 1.0], highest=1, bins=2)
    assert [(b.low, b.high, b.items) for b in bins] == [(0, 0.5, 3), (0.5, 1, 2)]
    assert bins[0].mean == pytest.approx(0.2 / 3) and bins[0].reference == pytest.approx(1 / 3)
    assert bins[1].mean == pytest.approx(0.8) and bins[1].reference == 1
    assert calibration_error(bins) == pytest.approx((3 * (1 / 3 - 0.2 / 3) + 2 * 0.2) / 5)
    assert [b.items for b in reliability([5.0, 4.0, 3.9], [5.0] * 3, highest=5, bins=5)] == [0, 0, 0, 1, 2]
    assert calibration_error(reliability([], [], highest=1, bins=10)) is None


# --- the command ---

WISHES = ["Let us share it.", "I agree, gladly.", "No, never.", "I refuse.", "Take it then.", "Fine, I accept."]


@pytest.fixture
def transcripts(tmp_path: Path) -> Path:
    """Six dialogues of two rounds, five of them with a completion; as a run records them, less what is not read."""
    lines = []
    for number, wish in enumerate(WISHES):
        texts = [("agent1", "Half each?"), ("agent2", f"Hm {number}."), ("agent1", f"Well {number}."), ("agent2", wish)]
        lines.append(
            {
                "dilemma": ["prof-0105", "conf-001"][number % 2],
                "pair": ["candor-vs-harmony", "conf-001"][number % 2],
                "agent1": ["The Peacekeeper", "Bookkeeper Donatella"][number % 2],
                "agent2": ["The Plain Speaker", "Master Glassblower Aldo"][number % 2],
                "dialogue": number,
                "utterances": [{"agent": agent, "text": text, "finish_reason": "stop"} for agent, text in texts],
                "completion": f"They share it, {number} for each." if number else None,
            }
        )
    file = tmp_path / "step-00001.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def endpoint() -> Iterator[MisbehavingEndpoint]:
    """Model "steady" goes by the text, "fickle" also by the seed."""

    def answer(number: int, received: Received) -> Answer:
        code = re.search(r'"code": "(\w+)"', received.body["messages"][0]["content"])
        assert code is not None
        fickle = received.body["model"] == "fickle" and received.body["seed"] % 2 == 1
        found = re.search(r"They share it, (\d)", received.user)
        if found:
            return says(json.dumps({"code": code[1], "score": 5 - int(found[1]) if fickle else int(found[1])}))
        agree = any(word in received.user for word in ("gladly", "Take it", "accept"))
        return says(json.dumps({"code": code[1], "agree": agree != fickle}))

    serving = MisbehavingEndpoint(answer)
    yield serving
    serving.close()


def quality(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, dict[str, Any]]:
    assert main(["quality", *map(str, arguments)]) == 0
    *markdown, last = capsys.readouterr().out.strip().split("\n")
    return "\n".join(markdown), json.loads(last)


def openai(endpoint: MisbehavingEndpoint, name: str) -> list[str]:
    return [
        *("--judge.agreement", "openai", "--judge.reward", "openai"),
        *("--judge.url", endpoint.url, "--judge.name", name, "--judge.temperature", "0.5"),
    ]


def test_a_fickle_judge_is_found_out_and_a_steady_one_too(
    transcripts: Path, endpoint: MisbehavingEndpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    _, steady = quality(capsys, transcripts, *openai(endpoint, "steady"))
    assert steady["retest_agreement"] == {
        "items": 12, "failed": 0, "same": 1.0, "difference": 0.0, "kappa": 1.0, "spearman": 1.0, "kendall": 1.0
    }  # fmt: skip
    assert steady["retest_score"]["items"] == 5 and steady["retest_score"]["same"] == 1.0
    assert "against_score" not in steady
    markdown, fickle = quality(capsys, transcripts, *openai(endpoint, "fickle"), "--repeats", "3")
    # Seeds 0, 1, 2: two of the three pairs of repetitions say the opposite of one another.
    assert fickle["retest_agreement"]["items"] == 36
    assert fickle["retest_agreement"]["same"] == pytest.approx(1 / 3)
    assert fickle["retest_score"]["difference"] == pytest.approx(2 / 3 * (3 + 1 + 1 + 3 + 5) / 5)
    assert "| agreement | 36 | 0 | 0.333 | 0.667 |" in markdown


def test_a_second_judge_ranks_and_calibrates(
    transcripts: Path, endpoint: MisbehavingEndpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    second = "--against.reward", "negotiator.judges.rewards:asks_a_question", "--against.name", "fickle"
    cached = "--judge.cache", tmp_path / "answers.sqlite", "--repeats", "1"
    for _ in range(2):
        markdown, figures = quality(capsys, transcripts, *openai(endpoint, "steady"), *second, *cached)
    assert len(endpoint.received) == 12 + 5 + 12  # once: the second time everything is in the cache
    assert set(figures) == {"against_agreement", "against_score", "calibration_agreement", "calibration_score"}
    assert figures["against_agreement"]["kappa"] == 1.0 and figures["calibration_agreement"]["error"] == 0.0
    assert figures["against_score"]["spearman"] is None  # the plug-in gives all of them the same 1.25
    assert figures["against_score"]["difference"] == pytest.approx((0.25 + 0.75 + 1.75 + 2.75 + 3.75) / 5)
    assert [b["items"] for b in figures["calibration_score"]["bins"]] == [0, 1, 1, 1, 2]
    assert "| score | 5 | 0 | 0.000 | 1.850 | - | - | - |" in markdown
    assert "agreement fickle at http" in markdown and "score negotiator.judges.rewards:asks_a_question" in markdown


def test_failed_verdicts_are_counted_and_take_part_in_nothing(
    transcripts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving = MisbehavingEndpoint(lambda number, received: says("?"))
    try:
        _, figures = quality(capsys, transcripts, *openai(serving, "m"), "--judge.retries", "0", "--sample", "2")
    finally:
        serving.close()
    assert figures["retest_agreement"] == {
        "items": 0, "failed": 4, "same": None, "difference": None, "kappa": None, "spearman": None, "kendall": None
    }  # fmt: skip


def test_the_local_judge_is_the_same_each_time(
    transcripts: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--model.path", tiny_model, "--model.dtype", "fp32", "--model.device", "cpu"]
    other = ["--engine.cache_tokens", "4096", "--against.agree_threshold", "0.42"]
    _, figures = quality(capsys, transcripts, *small, *other, "--sample", "3")
    for what in ("retest_agreement", "retest_score", "against_score"):
        assert figures[what]["same"] == 1.0 and figures[what]["difference"] < 1e-4
    assert figures["against_agreement"]["kendall"] == pytest.approx(1.0)
    # Calibrated by the second judge's yes and no, not by its probabilities.
    agreed = [b["reference"] * b["items"] for b in figures["calibration_agreement"]["bins"]]
    assert agreed == pytest.approx([round(count) for count in agreed])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dilemma": "gone"}, 'step-00001.jsonl:1: no dilemma has the id "gone"; name the run\'s with --data.dilemmas'),
        ({"agent1": "Nobody"}, 'no persona pair "candor-vs-harmony" of these names'),
        ({"utterances": 3}, "step-00001.jsonl:1: not a line of a run's transcript"),
        ({"utterances": [], "completion": None}, "these transcripts hold nothing to judge"),
    ],
)
def test_a_users_mistake_ends_it_with_a_sentence(
    transcripts: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    line = json.loads(transcripts.read_text().split("\n")[0])
    transcripts.write_text(json.dumps(line | change) + "\n")
    assert main(["quality", str(transcripts)]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_other_mistakes(transcripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "gone.jsonl"]) == 2
    assert "gone.jsonl: no such file; transcripts are runs/<name>/transcripts/" in capsys.readouterr().err
    assert main(["quality", str(transcripts), "--against.reward", "openai"]) == 2
    assert "an openai judge needs judge.url" in capsys.readouterr().err
    for wrong in (["--sample", "0"], ["--against.nothing", "1"], []):
        with pytest.raises(SystemExit) as error:
            main(["quality", *wrong])
        assert error.value.code == 2
