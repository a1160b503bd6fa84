"""The rollout benchmark: what it asks for, who answers, and the real command on a tiny model."""

from __future__ import annotations

import csv
import functools
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMOLLM2
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks import processes, rollout
from benchmarks.contenders import Contender, EnginePlayer, HuggingFacePlayer, Place, Played, make_player
from benchmarks.hf_generate import HuggingFace, extrapolate
from benchmarks.processes import Failed, Worker
from benchmarks.workload import OWN, Shape, Workload, make_workload
from negotiator.config import EngineConfig
from negotiator.data import load_dilemmas, load_personas
from negotiator.prompts.templates import Templates
from negotiator.types import Scenario

CPU = torch.device("cpu")
SHAPE = Shape(scenarios=3, group=4, prefix=70, new_tokens=5)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny one with half its vocabulary for end tokens: whoever heeds them ends early."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # the text depends on all of the prompt
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(range(0, len(tokenizer), 2)),
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def workload(tokenizer: PreTrainedTokenizerBase) -> Workload:
    return make_workload(tokenizer, SHAPE)


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SHAPE, Shape(2, 32, 300, 64)], ids=str)
def test_a_group_shares_exactly_its_prefix(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> None:
    workload = make_workload(tokenizer, shape)
    assert len(workload.prompts) == shape.dialogues
    assert len(set(workload.prefixes)) == shape.scenarios
    groups = [workload.prompts[i : i + shape.group] for i in range(0, shape.dialogues, shape.group)]
    for prefix, group in zip(workload.prefixes, groups, strict=True):
        assert len(prefix) == shape.prefix
        for ids in group:
            assert len(ids) == shape.prefix + OWN
            assert ids[: shape.prefix] == prefix
    assert len({ids[shape.prefix] for ids in workload.prompts}) == shape.dialogues  # nobody shares a token more
    assert len({ids[shape.prefix + 1 :] for ids in workload.prompts[: shape.group]}) == 1
    seeds = {workload.sampling(i).seed for i in range(shape.dialogues)}
    assert len(seeds) == shape.dialogues
    assert workload.sampling(0).stop_ids == ()


def test_prompts_are_negotiations(tokenizer: PreTrainedTokenizerBase, workload: Workload) -> None:
    pair, dilemma = load_personas()[0], load_dilemmas()[0]
    real = Templates(tokenizer).prefix_ids(Scenario(0, dilemma, pair.a, pair.b, pair.id), "agent1")
    assert workload.prefixes[0] == real[: SHAPE.prefix]
    assert tokenizer.decode(workload.prompts[0][-OWN:]).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_perfect_cache_computes_every_prefix_once(workload: Workload) -> None:
    common = 0  # how many tokens of each prefix an earlier scenario begins with
    for number, prefix in enumerate(workload.prefixes):
        lengths = range(SHAPE.prefix + 1)
        common += max(
            (n for n in lengths for other in workload.prefixes[:number] if prefix[:n] == other[:n]), default=0
        )
    assert common > 0
    assert workload.reusable_tokens() == SHAPE.dialogues * SHAPE.prefix + common


def test_the_shapes_are_those_of_the_promise() -> None:
    arguments = rollout.parse(["--bar"])
    assert rollout.chosen_shapes(arguments, CPU) == ("rollout-bar", [Shape(4, 8, 256, 64)])
    _, shapes = rollout.chosen_shapes(rollout.parse([]), CPU)
    assert shapes[0] == rollout.BAR
    base = rollout.SWEEP["cpu"]
    assert {s.group for s in shapes[1:] if s == base._replace(group=s.group)} == {1, 2, 4, 8, 16, 32}
    assert {s.prefix for s in shapes[1:] if s == base._replace(prefix=s.prefix)} == {64, 128, 256, 512, 1024, 2048}
    for device in (CPU, torch.device("cuda")):
        _, shapes = rollout.chosen_shapes(rollout.parse([]), device)
        assert len(set(shapes)) == len(shapes)
    own = rollout.parse(["--group", "3", "--new-tokens", "4"])
    assert rollout.chosen_shapes(own, CPU) == ("rollout-own", [Shape(4, 3, 256, 4)])


@pytest.mark.parametrize(("native", "quick"), [(False, "fp32"), (True, "bf16")])
def test_everybody_runs_in_the_dtypes_that_are_told(monkeypatch: pytest.MonkeyPatch, native: bool, quick: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": native})
    names = [c.name for c in rollout.contenders(("embedded", "hf", "sglang"), "fp32", CPU)]
    assert names[:3] == ["embedded-fp32", "embedded-bf16", f"sglang-{quick}"]
    assert sorted(names[3:]) == sorted(["hf-bf16", "hf-fp32", f"hf-shared-{quick}"])
    assert [c.name for c in rollout.contenders(("embedded",), "bf16", CPU)] == ["embedded-bf16"]
    assert rollout.contenders(("hf",), "fp32", CPU)[0] == Contender("hf", quick)


# --- who is asked -----------------------------------------------------------------------------------------------------


def test_each_round_of_an_engine_starts_cold_and_shares_all_it_can(model: Path, workload: Workload) -> None:
    player = EnginePlayer(Contender("embedded", "fp32"), Place(model, CPU, EngineConfig(cache_tokens=2048)))
    rounds = [player.play(workload, limit_s=0) for _ in range(2)]
    player.close()
    for one in rounds:
        assert one.new_tokens == SHAPE.dialogues * SHAPE.new_tokens
        assert one.prompt_tokens == SHAPE.scenarios * SHAPE.prefix + SHAPE.dialogues * (SHAPE.prefix + OWN)
        assert one.cached_tokens == workload.reusable_tokens()
        assert one.update_seconds is not None and one.update_seconds > 0
        assert 0 < one.prefill_seconds + one.decode_seconds < one.seconds
        assert one.estimated_from == ""


def test_hugging_face_generates_the_same_with_its_prefixes_shared(
    model: Path, workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for shares in (False, True):
        hugging_face = HuggingFace(model, CPU, torch.float32, shares)
        hugging_face._model.generation_config.do_sample = False

        def keep(*arguments: Any, _generate: Any = hugging_face._model.generate, **more: Any) -> torch.Tensor:
            texts.append(_generate(*arguments, **more))
            return texts[-1]

        monkeypatch.setattr(hugging_face._model, "generate", keep)
        assert min(hugging_face.generate(workload)) > 0
    assert texts[0].shape == (SHAPE.dialogues, SHAPE.prefix + OWN + SHAPE.new_tokens)
    assert torch.equal(*texts)


def test_what_takes_hugging_face_too_long_is_estimated(model: Path, workload: Workload) -> None:
    assert extrapolate(Shape(4, 8, 256, 64), prompt=2.0, steps=1.5) == (64.0, 63 * 0.5)

    place = Place(model, CPU, EngineConfig())
    plain, sharing = (HuggingFacePlayer(Contender(engine, "fp32"), place) for engine in ("hf", "hf-shared"))
    measured, estimated = (plain.play(workload, limit_s) for limit_s in (600.0, 0.0))
    assert measured.estimated_from == ""
    assert estimated.estimated_from
    assert (measured.cached_tokens, measured.prompt_tokens) == (0, SHAPE.dialogues * (SHAPE.prefix + OWN))
    assert estimated[3:6] == measured[3:6]
    assert estimated.seconds == estimated.prefill_seconds + estimated.decode_seconds > 0
    shared = sharing.play(workload, 0.0)
    assert shared.estimated_from == ""
    assert shared.prompt_tokens - shared.cached_tokens == SHAPE.scenarios * SHAPE.prefix + SHAPE.dialogues * OWN


def test_memory_is_the_peak_of_one_round(workload: Workload) -> None:
    class Hungry:
        def __init__(self, *mib: int) -> None:
            self.mib = list(mib)

        def play(self, workload: Workload, limit_s: float) -> Played:
            torch.ones(self.mib.pop() << 18).sum()
            return Played(1.0, 0.5, 0.5, 1, 1, 0)

        def processes(self) -> list[int]:
            return [os.getpid()]

    hungry: Any = Hungry(0, 64, 256)
    large, small, nothing = (processes._watched(hungry, CPU, workload, 0.0).peak_bytes for _ in range(3))
    assert large - nothing == pytest.approx(256 << 20, rel=0.1)
    assert small - nothing == pytest.approx(64 << 20, rel=0.1)


def test_a_worker_that_fails_or_dies_says_why(model: Path, tmp_path: Path, workload: Workload) -> None:
    places = (Place(tmp_path, CPU, EngineConfig()), Place(model, CPU, EngineConfig(cache_tokens=2048)))
    makers = [functools.partial(make_player, Contender("embedded", "fp32"), place) for place in places]
    bad, good = (Worker(make, CPU, (workload, 1.0)) for make in makers)
    answer = bad.about()
    assert isinstance(answer, Failed)
    assert answer.why.startswith(f"ValueError: no model at {tmp_path}")
    assert isinstance(good.about(), str)
    first = good.play(workload, 1.0)
    assert isinstance(first, Played)
    assert first.peak_bytes is not None and first.peak_bytes > 64 << 20
    good._process.kill()
    good._process.join()
    assert good.play(workload, 1.0) == Failed("its process ended with exit code -9")
    for worker in (bad, good):
        worker.close()


# --- the command ------------------------------------------------------------------------------------------------------


def test_mistakes_are_told_in_a_sentence(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mistakes = {
        "leave out --new-tokens": ("--bar", "--new-tokens", "4"),
        "no model at": ("--model", str(tmp_path)),
        "does not fit the model's context of 512": ("--model", str(model), "--prefix", "500"),
        "different tokens": ("--model", str(model), "--group", "100000", "--prefix", "40"),
    }
    if not torch.cuda.is_available():
        mistakes["no CUDA device"] = ("--device", "cuda")
    for words, arguments in mistakes.items():
        assert rollout.main([*arguments, "--out", str(tmp_path)]) == 2
        out, error = capsys.readouterr()
        assert words in error
        assert error.count("\n") == 1
        assert out == ""
    for arguments in (("--group", "0"), ("--engine", "magic"), ("--prefix", "many")):
        with pytest.raises(SystemExit, match="2"):
            rollout.main(arguments)
    assert not list(tmp_path.iterdir())


def command(model: Path, out: Path, *engines: str) -> int:
    shape = ("--scenarios", "2", "--group", "3", "--prefix", "80", "--new-tokens", "4")
    where = ("--model", str(model), "--device", "cpu", "--dtype", "bf16", "--out", str(out))
    return rollout.main(["--engine", *engines, *where, *shape])


def test_the_last_line_and_the_csv_agree(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "BAR_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)  # where there is no SGLang
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "cpu_name": "some"})
    assert command(model, tmp_path, "embedded", "hf", "sglang") == 0
    out = capsys.readouterr().out
    figures = json.loads(out.splitlines()[-1])
    (path,) = tmp_path.glob("rollout-own-*.csv")
    rows = {line["contender"]: line for line in csv.DictReader(path.read_text().splitlines())}
    assert list(rows) == ["embedded-bf16", "sglang-fp32", "hf-fp32", "hf-bf16", "hf-shared-fp32"]
    assert rows.pop("sglang-fp32")["status"] == "off"
    assert {line["status"] for line in rows.values()} == {"measured"}

    speed = {name: float(line["tokens_per_s"]) for name, line in rows.items()}
    ours = rows["embedded-bf16"]
    assert (figures["ours"], figures["tokens_per_s"]) == ("embedded-bf16", speed["embedded-bf16"])
    assert figures["speedup_vs_hf"] == speed["embedded-bf16"] / speed["hf-bf16"]
    assert figures["speedup_vs_hf_fp32"] == speed["embedded-bf16"] / speed["hf-fp32"]
    assert figures["speedup_vs_hf_shared_prefix"] == speed["embedded-bf16"] / speed["hf-shared-fp32"]
    assert figures["speedup_vs_sglang"] is None
    assert "make sglang" in figures["off"]["sglang-fp32"]
    assert figures["cached_fraction_of_ideal"] == figures["prefill_growth_g1_to_g32"] == 1.0
    assert figures["prefill_seconds_growth_g1_to_g32"] > 0
    assert figures["shape"] == {"scenarios": 2, "group": 3, "prefix": 80, "new_tokens": 4}
    assert (figures["torch"], figures["model"]) == (torch.__version__, model.name)
    assert ours["cached_fraction_of_ideal"] == "1.0"
    assert int(ours["computed_prompt_tokens"]) < 2 * 80 + 6 * OWN < int(rows["hf-fp32"]["computed_prompt_tokens"])
    assert {int(line["peak_bytes"]) > 100 << 20 for line in rows.values()} == {True}
    assert not multiprocessing.active_children()


def test_an_engine_that_is_not_here_cannot_be_asked_alone(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(model, tmp_path, "sglang") == 2
    assert "make sglang" in capsys.readouterr().err


@pytest.mark.sglang
def test_against_sglang(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(model, tmp_path, "embedded", "sglang") == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["off"] == {}
    assert figures["speedup_vs_sglang"] > 0
    (path,) = tmp_path.glob("rollout-own-*.csv")
    (line,) = [line for line in csv.DictReader(path.read_text().splitlines()) if line["contender"].startswith("sglang")]
    assert line["cached_fraction_of_ideal"] == "1.0"
    assert int(line["peak_bytes"]) > 500 << 20  # the server's, not the client's
