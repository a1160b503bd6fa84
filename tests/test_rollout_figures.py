"""The rollout benchmark's books: who plays how often, medians, ratios, the growth of prefill, the plots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import SMOLLM2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks import processes, rollout
from benchmarks.contenders import Played
from benchmarks.processes import Failed, play_rounds
from benchmarks.rollout_plots import draw
from benchmarks.rollout_report import Row, make_row, summarise, write_results
from benchmarks.workload import OWN, Shape, Workload, make_workload

SHAPE = Shape(scenarios=3, group=4, prefix=70, new_tokens=5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def workload(tokenizer: PreTrainedTokenizerBase) -> Workload:
    return make_workload(tokenizer, SHAPE)


def played(seconds: float = 2.0, **values: Any) -> Played:
    usual = {"prefill_seconds": 1.5, "decode_seconds": 0.5, "new_tokens": 60, "prompt_tokens": 1000, "cached_tokens": 0}
    return Played(seconds, **{**usual, **values})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Scripted:
    """A worker that has its answers already; the clock shows that it took its time over them."""

    def __init__(self, name: str, log: list[str], answers: Iterator[Played | Failed], clock: Clock) -> None:
        self.name, self.log, self.answers, self.clock = name, log, answers, clock

    def play(self, workload: Workload, limit_s: float) -> Played | Failed:
        self.log.append(self.name)
        answer = next(self.answers)
        self.clock.now += answer.seconds if isinstance(answer, Played) else 0.0
        return answer


Rounds = tuple[list[str], dict[str, list[Played] | Failed]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rounds]:
    def rounds(budget_s: float, **answers: Sequence[Played | Failed]) -> Rounds:
        log: list[str] = []
        clock = Clock()
        monkeypatch.setattr(processes, "time", clock)
        workers: Any = {name: Scripted(name, log, iter(some), clock) for name, some in answers.items()}
        return log, play_rounds(workers, (Workload(SHAPE, [], []), 1.0), budget_s)

    return rounds


def test_rounds_are_by_turns_while_there_is_time(play: Callable[..., Rounds]) -> None:
    log, found = play(1e6, a=[played()] * 9, b=[played()] * 9, c=[played()] * 9)
    assert log == [*"abc", *"bca", *"cab", *"abc", *"bca"]
    assert [len(some) for some in found.values()] == [5, 5, 5]
    slow, quick = [played(40.0)] * 5, [played(20.0, update_seconds=5.0)] * 5
    assert play(0.0, slow=slow, quick=quick)[0] == ["slow", "quick"]
    assert play(84.0, slow=slow, quick=quick)[0] == ["slow", "quick"]
    assert play(85.0, slow=slow, quick=quick)[0] == ["slow", "quick", "quick"]
    assert play(105.0, slow=slow, quick=quick)[0] == ["slow", "quick", "quick", "quick"]
    assert play(125.0, slow=slow, quick=quick)[0] == ["slow", "quick", "slow", "quick"]


def test_who_fails_or_is_estimated_is_asked_no_more(play: Callable[..., Rounds]) -> None:
    log, found = play(1e6, a=[played(), Failed("gone")], b=[played(estimated_from="two steps")], c=[played()] * 5)
    assert log == [*"abc", *"ca", *"ccc"]
    assert found["a"] == Failed("gone")
    assert [len(found[name]) for name in "bc"] == [1, 5]


def test_a_row_has_medians_and_the_extremes(workload: Workload) -> None:
    ideal = workload.reusable_tokens()
    rounds = [
        played(seconds, prefill_seconds=seconds / 2, cached_tokens=cached, peak_bytes=peak, update_seconds=1.0)
        for seconds, cached, peak in ((2.0, ideal, 7), (1.0, ideal - 1, 9), (6.0, ideal, 8))
    ]
    row = make_row("embedded-fp32", rounds, workload)
    assert (row.shape, row.status, row.rounds) == (SHAPE, "measured", 3)
    assert (row.tokens_per_s_low, row.tokens_per_s, row.tokens_per_s_high) == (10.0, 30.0, 60.0)
    assert (row.prefill_seconds, row.decode_seconds, row.update_seconds, row.peak_bytes) == (1.0, 0.5, 1.0, 9)
    assert row.computed_prompt_tokens == 1000 - ideal + 1
    assert row.cached_fraction_of_ideal == (ideal - 1) / ideal
    assert make_row("x", [played(estimated_from="y")], workload).status == "estimated"
    failed = make_row("x", Failed("out of luck"), workload)
    assert (failed.status, failed.detail, failed.tokens_per_s) == ("failed", "out of luck", None)


def row(contender: str, tokens_per_s: float | None, status: Any = "measured", shape: Shape = SHAPE) -> Row:
    return Row(contender, *shape, status=status, detail=f"of {contender}", tokens_per_s=tokens_per_s)


def test_figures_compare_like_with_like() -> None:
    rows = [
        row("embedded-fp32", 80.0),
        row("embedded-bf16", 100.0),
        row("sglang-fp32", 40.0),
        row("hf-fp32", 10.0),
        row("hf-bf16", 5.0, "estimated"),
        row("hf-shared-fp32", 16.0),
    ]
    figures = summarise(rows)
    assert (figures["ours"], figures["tokens_per_s"]) == ("embedded-fp32", 80.0)
    assert (figures["speedup_vs_hf"], figures["speedup_vs_hf_fp32"]) == (16.0, 8.0)
    assert (figures["speedup_vs_hf_shared_prefix"], figures["speedup_vs_sglang"]) == (5.0, 2.0)
    assert figures["hf_dtype_fastest"] == "fp32"
    assert figures["estimated"] == ["hf-bf16"]
    assert figures["off"] == {}
    assert figures["tokens_per_s_of"]["embedded-bf16"] == 100.0
    assert rollout.slower_hugging_face(rows) == {"hf-bf16"}

    figures = summarise([rows[0], row("sglang-fp32", None, "off"), row("hf-bf16", None, "failed")])
    assert figures["speedup_vs_sglang"] is figures["speedup_vs_hf"] is figures["hf_dtype_fastest"] is None
    assert figures["off"] == {"sglang-fp32": "of sglang-fp32", "hf-bf16": "of hf-bf16"}
    alone = summarise(rows[3:])
    assert (alone["tokens_per_s"], alone["speedup_vs_hf"], alone["speedup_vs_hf_fp32"]) == (10.0, None, None)


def test_growth_of_prefill_leaves_out_what_is_the_dialogues_own(tokenizer: PreTrainedTokenizerBase) -> None:
    prefixes = SHAPE.scenarios * SHAPE.prefix

    def growth(*per_group: tuple[int, float]) -> dict[str, float | None]:
        """`per_group`: how often prefixes are computed, and seconds, at G = 1 and at G = 32."""
        one_round = [
            played(prompt_tokens=times * prefixes + SHAPE.scenarios * g * OWN + 40, cached_tokens=40, prefill_seconds=s)
            for (times, s), g in zip(per_group, (1, 32), strict=True)
        ]
        log: list[str] = []
        worker: Any = Scripted("ours", log, iter(one_round * rollout.GROWTH_ROUNDS), Clock())
        return rollout.prefill_growth(worker, tokenizer, SHAPE)

    perfect = growth((1, (prefixes + 3 * OWN) / 100), (1, (prefixes + 96 * OWN) / 100))
    assert perfect == {name: pytest.approx(1.0) for name in rollout.GROWTH}
    assert growth((1, 1.0), (32, 1.0))["prefill_growth_g1_to_g32"] == 32.0
    slower = growth((1, (prefixes + 3 * OWN) / 100), (1, (prefixes + 96 * OWN) / 50))
    assert slower["prefill_growth_g1_to_g32"] == 1.0
    assert slower["prefill_seconds_growth_g1_to_g32"] == pytest.approx(2.0)

    failing: Any = Scripted("ours", [], iter([Failed("gone")]), Clock())
    assert rollout.prefill_growth(failing, tokenizer, SHAPE) == dict.fromkeys(rollout.GROWTH)


def test_plots_have_a_column_for_what_varies(tmp_path: Path) -> None:
    about = {"model": "tiny", "device": "here", "torch": "2"}
    shapes = [SHAPE._replace(group=g) for g in (1, 2, 4)]
    rows = [row(name, 10.0 * s.group, "estimated", s) for s in shapes for name in ("embedded-fp32", "hf-fp32")]
    write_results(rows, about, tmp_path / "some.csv")
    assert draw(tmp_path / "some.csv") == [tmp_path / "some.png"]
    assert (tmp_path / "some.png").stat().st_size > 10_000
    write_results(rows[:4], about, tmp_path / "few.csv")
    assert not (tmp_path / "few.png").exists()
