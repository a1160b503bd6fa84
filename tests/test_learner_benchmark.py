"""The learner benchmark: what is trained on, that everybody takes the same step, its arithmetic, the real command."""

from __future__ import annotations

import csv
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMOLLM2, made_up_samples
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PretrainedConfig, Qwen3Config

from benchmarks import learner, learner_report
from benchmarks.decode import make_model
from benchmarks.learner_contenders import HuggingFacePlayer, LearnerPlayer, Place, Played, padded_batches
from benchmarks.learner_report import Rates, Setting, make_row, summarise, summarise_steps
from benchmarks.learner_steps import OurStepPlayer, StepPlayed, TRLPlayer
from benchmarks.learner_workload import MODELS, Shape, Workload, make_workload, of_tokens, separate
from benchmarks.processes import Failed
from benchmarks.workload import OWN
from benchmarks.workload import Shape as PromptShape
from benchmarks.workload import make_workload as make_prompts
from negotiator.attention import PackedLayout
from negotiator.config import OptimizerConfig
from negotiator.dialogue import AGENTS
from negotiator.flops import Model, Work
from negotiator.packing import pack

CPU = torch.device("cpu")
SHAPE = Shape(scenarios=2, group=3, rounds=2, prefix=20, context=12, utterance=5)
SIZES: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3, "tie_word_embeddings": True,
}  # fmt: skip
TINY = Qwen3Config(**SIZES, head_dim=16)


# --- what is trained on -----------------------------------------------------------------------------------------------


def test_agents_speak_in_turns_over_shared_prefixes() -> None:
    workload = make_workload(SHAPE, vocabulary=1000)
    dialogues = [workload.samples[i : i + 4] for i in range(0, len(workload.samples), 4)]
    assert len(dialogues) == 2 * 3
    for number, dialogue in enumerate(dialogues):
        assert [sample.prefix_key for sample in dialogue] == [(number // 3, agent) for agent in AGENTS] * 2
        assert [len(sample.prompt_ids) for sample in dialogue] == [20 + OWN, 32, 32, 32]
        assert {(len(sample.response_ids), len(sample.sampling_logprobs)) for sample in dialogue} == {(5, 5)}
        assert len({sample.advantage for sample in dialogue}) == 1
    prefixes = {(sample.prefix_key, sample.prompt_ids[: sample.prefix_len]) for sample in workload.samples}
    assert len(prefixes) == len({prefix for _, prefix in prefixes}) == 4  # one for each key
    assert {len(prefix) for _, prefix in prefixes} == {20}
    assert len({sample.prompt_ids + sample.response_ids for sample in workload.samples}) == 24
    assert make_workload(SHAPE, vocabulary=1000) == workload


@pytest.mark.parametrize("shape", [SHAPE, learner.BAR], ids=str)
def test_tokens_are_what_packing_makes_of_them(shape: Shape) -> None:
    samples = make_workload(shape, vocabulary=50).samples
    batches = pack(samples, max_tokens=10**6)
    assert shape.tokens == sum(len(batch.input_ids) for batch in batches)
    alone = Work.of_samples(samples)
    assert Work.of_batches(pack(separate(samples), 1000)) == alone
    assert alone.tokens == batches[0].logical_tokens
    assert alone.trained == Work.of_batches(batches).trained == shape.utterance * len(samples)


def test_pairs_are_those_that_attention_computes() -> None:
    shape = Shape(scenarios=1, group=2, rounds=1, prefix=6, context=3, utterance=4)
    (batch,) = pack(make_workload(shape, vocabulary=50).samples, max_tokens=10**6)
    values = torch.eye(shape.tokens, 64)[None, None]  # so that what comes out are the weights of the keys
    weights = PackedLayout(batch.segments).attend(0, values, values, values, scale=1.0)
    assert Work.of_batches([batch]).pairs == int((weights > 0).sum())


def test_the_shapes_are_those_of_the_promise() -> None:
    bar = learner.make_plan(learner.parse(["--bar", "--device", "cpu"]))
    assert (bar.model, bar.shapes, bar.stem) == ("smollm2-135m", [Shape(1, 8, 3, 256, 128, 64)], "learner-bar")
    shapes = learner.make_plan(learner.parse(["--device", "cpu"])).shapes
    assert shapes[0] == learner.BAR
    for tokens in learner.TOKENS:
        closest = of_tokens(tokens, learner.BAR)
        assert closest in shapes
        assert abs(closest.tokens / tokens - 1) < 0.13
    assert of_tokens(1, learner.BAR).group == 2


# --- who trains -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, LlamaConfig(**SIZES)], ids=["qwen3", "llama"])
def test_everybody_takes_the_same_step(config: PretrainedConfig) -> None:
    workload = Workload(SHAPE, made_up_samples())
    optimizer = OptimizerConfig(micro_batch_tokens=110, warmup_steps=0)  # several passes for everyone
    place = Place(config, CPU, torch.float32, optimizer)
    players = (LearnerPlayer(place, shared=True), LearnerPlayer(place, shared=False), HuggingFacePlayer(place))
    for _ in range(2):  # the second one from the weights of the first
        ours, *others = (player.play(workload) for player in players)
        assert ours.grad_norm > 0
        for other in others:
            assert other.loss == pytest.approx(ours.loss, rel=1e-4)
            assert other.grad_norm == pytest.approx(ours.grad_norm, rel=1e-4)
            assert other.logical_tokens == other.work.tokens == ours.logical_tokens
            assert other.work.trained == ours.work.trained
            assert other.work.tokens > ours.work.tokens
        for played in (ours, *others):
            assert played.passes > 1
            phases = (played.forward_seconds, played.loss_seconds, played.backward_seconds, played.optimizer_seconds)
            assert min(phases) > 0
            assert sum(phases) <= played.seconds


def test_padded_batches_hold_everybody_and_keep_to_the_limit() -> None:
    samples = make_workload(SHAPE, vocabulary=50).samples
    batches = padded_batches(samples, max_tokens=110)
    assert sorted(id(sample) for batch in batches for sample in batch) == sorted(map(id, samples))
    longest = [max(len(s.prompt_ids) + len(s.response_ids) - 1 for s in batch) for batch in batches]
    assert all(length * len(batch) <= 110 for length, batch in zip(longest, batches, strict=True))
    assert len(padded_batches(samples, max_tokens=1)) == len(samples)


def test_full_steps_train_on_the_same_tokens(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    eos = list(range(0, len(tokenizer), 2))  # whoever heeds them ends early
    LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": len(tokenizer)}, eos_token_id=eos)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    workload = make_prompts(tokenizer, PromptShape(scenarios=1, group=4, prefix=60, new_tokens=6))
    for player in (OurStepPlayer(tmp_path, CPU, torch.float32), TRLPlayer(tmp_path, CPU, torch.float32)):
        before = [weight.clone() for weight in player.model.parameters()]
        played = player.play(workload)
        assert played.trained_tokens == 4 * 6
        assert played.prompt_tokens == 60 + OWN
        assert played.seconds > 0
        assert any(not torch.equal(a, b) for a, b in zip(before, player.model.parameters(), strict=True))
        player.close()


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_sizes_are_the_published_ones() -> None:
    for name, total, without_embedding in (("qwen3-0.6b", 0.6e9, 0.44e9), ("qwen3-4b", 4.0e9, 3.6e9)):
        sizes = Model.of(MODELS[name])
        assert sizes.matrices == pytest.approx(without_embedding, rel=0.02)
        assert sizes.matrices + sizes.head == pytest.approx(total, rel=0.02)
    assert Model.of(MODELS["qwen3-4b"]).attention == 36 * 32 * 128


@pytest.mark.parametrize("config", [TINY, LlamaConfig(**SIZES)], ids=["qwen3", "llama"])
def test_operations_are_those_that_torch_counts(config: PretrainedConfig) -> None:
    """With attention in plain products, which computes what is masked as well."""
    config._attn_implementation = "eager"
    model = make_model(config, CPU, torch.float32)
    length, kept = 20, 7
    with FlopCounterMode(display=False) as counted:
        model(torch.arange(length)[None], logits_to_keep=kept).logits.sum().backward()
    assert Model.of(config).flop(Work(length, kept, pairs=length**2)) == counted.get_total_flops()


def played(seconds: float, **values: Any) -> Played:
    usual: dict[str, Any] = {
        "forward_seconds": seconds / 4, "loss_seconds": seconds / 16, "backward_seconds": seconds / 2,
        "optimizer_seconds": seconds / 8, "logical_tokens": 1000, "work": Work(400, 100, 2000), "passes": 2,
        "loss": 0.1, "grad_norm": 1.0,
    }  # fmt: skip
    return Played(seconds, **{**usual, **values})


def test_figures_are_of_medians_over_the_right_peak() -> None:
    workload = make_workload(SHAPE, vocabulary=50)
    setting = Setting("tiny", "fp32", OptimizerConfig(), Model(10, 20, 3), Rates(measured=1e3, stated=4e3))
    ours = make_row("ours", [played(s, peak_bytes=p) for s, p in ((2.0, 7), (1.0, 9), (8.0, 8))], workload, setting)
    assert (ours.shape, ours.tokens, ours.steps) == (SHAPE, SHAPE.tokens, 3)
    assert (ours.seconds, ours.seconds_low, ours.seconds_high, ours.peak_bytes) == (2.0, 1.0, 8.0, 9)
    assert (ours.forward_seconds, ours.loss_seconds, ours.other_seconds) == (0.5, 0.125, 0.125)
    assert (ours.logical_tokens_per_s, ours.computed_tokens_per_s) == (500.0, 200.0)
    flop = 6 * (10 * 400 + 20 * 100) + 12 * 3 * 2000
    assert (ours.mfu, ours.mfu_of_measured) == (flop / 2 / 4e3, flop / 2 / 1e3)
    assert ours.mfu_logical == setting.sizes.flop(Work.of_samples(workload.samples)) / 2 / 4e3
    unstated = setting._replace(rates=Rates(1e3, None))
    assert make_row("ours", [played(2.0)], workload, unstated).mfu == flop / 2 / 1e3

    others = {"ours-separate": [played(6.0)], "hf": Failed("gone")}
    rows = [ours, *(make_row(name, result, workload, setting) for name, result in others.items())]
    figures = summarise(rows, setting.rates)
    assert (figures["who"], figures["logical_tokens_per_s"], figures["mfu"]) == ("ours", 500.0, ours.mfu)
    assert (figures["prefix_shared_speedup"], figures["speedup_vs_hf"]) == (3.0, None)
    assert figures["off"] == {"hf": "gone"}
    assert learner_report.stated_peak("NVIDIA H200") == 989e12
    assert learner_report.stated_peak("NVIDIA H100 PCIe") is None


def test_full_steps_are_compared_by_trained_tokens() -> None:
    ours, trl = [StepPlayed(2.0, 100, 9, rollout_seconds=1.5)], [StepPlayed(s, 50, 9) for s in (10.0, 5.0, 1.0)]
    figures = summarise_steps({"ours": ours, "trl": trl})
    assert figures["step_speedup_vs_trl"] == 5.0
    assert figures["step_seconds"] == {"ours": 2.0, "trl": 5.0}
    assert figures["step_rollout_seconds"] == 1.5
    figures = summarise_steps({"ours": ours, "trl": "not here"})
    assert (figures["step_speedup_vs_trl"], figures["step_off"]) == (None, {"trl": "not here"})
    assert summarise_steps({"ours": Failed("gone"), "trl": trl})["step_off"] == {"ours": "gone"}


def test_who_fails_or_takes_too_long_leaves_the_sweep() -> None:
    limit = learner.STEP_LIMIT_S
    found = {"a": [played(limit / 4)], "b": [played(limit / 2)], "c": Failed("gone"), "d": "left before"}
    gone = learner.leaving(found, growth=3.0)
    assert set(gone) == {"b", "c"}
    assert gone["b"] == f"a step would take about {1.5 * limit:,.0f} s"


# --- the command ------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {"leave out --model": ("--bar", "--tokens", "4096")}
    if not torch.cuda.is_available():
        mistakes["no CUDA device"] = ("--device", "cuda")
    for words, arguments in mistakes.items():
        assert learner.main(arguments) == 2
        out, error = capsys.readouterr()
        assert words in error
        assert error.count("\n") == 1
        assert out == ""
    for arguments in (("--tokens", "0"), ("--model", "gpt-2"), ("--contenders", "trl")):
        with pytest.raises(SystemExit, match="2"):
            learner.main(arguments)


def test_the_last_line_and_the_csv_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "qwen3-4b", TINY)
    monkeypatch.setitem(learner.BUDGET_S, "cpu", 0.0)
    monkeypatch.setattr(learner_report, "RATE_SECONDS", 0.1)
    what = ("--model", "Qwen3-4B", "--tokens", "2500", "--micro-batch", "1500", "--contenders", "ours")
    where = ("--device", "cpu", "--dtype", "fp32", "--profile", "--out", str(tmp_path))
    assert learner.main([*what, *where]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    (path,) = tmp_path.glob("learner-own-*.csv")
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert (row["contender"], row["status"], row["passes"]) == ("ours", "measured", "2")
    assert row["tokens"] == row["computed_tokens"]
    for name in ("logical_tokens_per_s", "computed_tokens_per_s", "mfu", "mfu_logical", "seconds", "peak_bytes"):
        assert figures[name] == float(row[name]) > 0
    assert figures["peak_bytes"] > 100 << 20
    assert figures["prefix_shared_speedup"] is figures["step_speedup_vs_trl"] is None
    assert "without --tokens" in figures["step_off"]["trl"]
    assert (figures["model"], figures["torch"]) == ("qwen3-4b", torch.__version__)
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert next(tmp_path.glob("learner-own-trace-*.json.gz")).stat().st_size > 1000
    assert not multiprocessing.active_children()
