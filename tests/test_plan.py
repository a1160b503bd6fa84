"""The plan of a run against what a run really takes: measured on an H200, or here on small models."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import SMOLLM2
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from negotiator import train
from negotiator.attention import PackedLayout, use_negotiator_attention
from negotiator.config import Config, DialogueConfig, LoRAConfig, OptimizerConfig, RolloutConfig, load_config
from negotiator.dialogue import AGENTS
from negotiator.flops import Model, Work
from negotiator.learner import recompute
from negotiator.lora import load_adapted
from negotiator.native_layers import use_native_layers
from negotiator.packing import pack
from negotiator.plan import (
    GIB,
    LIBRARY_BYTES,
    MEASURED_MFU,
    Lengths,
    Place,
    Plan,
    Sizes,
    activation_bytes,
    learner_memory,
    make_plan,
)
from negotiator.types import Segment, TurnSample

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QWEN3_4B = Qwen3Config(
    vocab_size=151_936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
)  # fmt: skip
QWEN3_14B = Qwen3Config(
    vocab_size=151_936, hidden_size=5120, intermediate_size=17_408, num_hidden_layers=40, num_attention_heads=40,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=False,
)  # fmt: skip
SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
LENGTHS = Lengths(utterance_prompt=100, utterance_prefix=80, completion_prompt=120, judge_prompt=0)


def planned(place: Place, model: Any = QWEN3_4B, lengths: Lengths = LENGTHS, **overrides: object) -> Plan:
    return make_plan(load_config(None, {**overrides}), model, lengths, place)


def within(limit: float, expected: float) -> Any:
    return pytest.approx(expected, rel=limit)


@pytest.mark.parametrize(
    "tokens, recompute, moments, one_pass, gib",
    [
        (8720, "none", True, False, 102.7),
        (8720, "none", False, False, 72.5),  # the first step, when Adam has none yet
        (17_440, "selective", True, True, 104.3),
        (4500, "none", True, False, 86.8),
    ],
)
def test_memory_is_what_an_h200_needed(monkeypatch, tokens, recompute, moments, one_pass, gib):
    """All of Qwen3-4B trained in bf16 by one process, with Liger's kernels: torch.cuda.max_memory_allocated."""
    monkeypatch.setattr("negotiator.plan.importlib.util.find_spec", lambda name: name == "liger_kernel")
    config = Config(optimizer=OptimizerConfig(recompute=recompute))
    memory, _ = learner_memory(config, Sizes.of(QWEN3_4B), Place(CUDA, torch.bfloat16), tokens, one_pass)
    assert (sum(memory.values()) - (0 if moments else memory["Adam moments"])) / GIB == within(0.04, gib)


class Alive(TorchDispatchMode):
    """Bytes of the tensors that were made inside and are still there."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._there = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._there | self._storages.keys():
                    self._storages[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._storages.pop, storage._cdata, None)
        return result

    def bytes(self) -> int:
        gc.collect()
        return sum(self._storages.values())


@pytest.mark.parametrize(
    "kind, dtype, what, rank",
    [
        (Qwen3Config, torch.float32, "none", 0),
        (LlamaConfig, torch.bfloat16, "none", 0),
        (Qwen3Config, torch.float32, "none", 4),
        (Qwen3Config, torch.bfloat16, "selective", 0),
        (LlamaConfig, torch.float32, "selective", 4),
        (Qwen3Config, torch.float32, "full", 0),
    ],
)
def test_activations_are_what_a_forward_pass_leaves(kind, dtype, what, rank):
    found, expected = [], []
    for layers in (1, 3):
        config = kind(num_hidden_layers=layers, **SMALL)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if rank:
            from peft import LoraConfig, inject_adapter_in_model

            settings = LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
            inject_adapter_in_model(settings, model.requires_grad_(False), adapter_name="default")
        use_native_layers(model, dtype)
        use_negotiator_attention(model)
        recompute(model, what)
        tokens = torch.arange(64)[None]
        with Alive(model) as alive:
            layout = PackedLayout([Segment(0, 4), Segment(4, 64, 0, 4)])
            output = model.get_decoder()(tokens, position_ids=tokens, use_cache=False, layout=layout)
            found.append(alive.bytes())
        del output
        expected.append(activation_bytes(Sizes.of(config), Place(CPU, dtype), what, "off", rank, 64))
    assert found[1] - found[0] == within(0.04, expected[1] - expected[0])


def test_adapters_and_4_bits_take_what_the_plan_says(tmp_path):
    config = Qwen3Config(num_hidden_layers=2, **SMALL | {"hidden_size": 512, "intermediate_size": 1024})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    lora = LoRAConfig(rank=8, quantize=True)
    model, held = load_adapted(tmp_path, CPU, torch.bfloat16, lora), 0
    for parameter in model.parameters():
        held += parameter.nbytes
        if (state := getattr(parameter, "quant_state", None)) is not None:
            held += state.absmax.nbytes + state.state2.absmax.nbytes
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    place = Place(CUDA, torch.bfloat16, processes=4)  # each has all of it
    memory, on_cpu = learner_memory(Config(lora=lora), Sizes.of(config), place, 100, False)
    assert memory["frozen weights"] == within(1e-3, held)
    masters = [memory[name] for name in ("fp32 master weights", "fp32 gradients", "Adam moments")]
    assert masters == [4 * adapters, 4 * adapters, 8 * adapters]
    assert on_cpu == 12 * adapters + LIBRARY_BYTES


def test_processes_share_what_is_trained_and_the_engine_has_its_own():
    alone, eight = (planned(Place(CUDA, torch.bfloat16, n)) for n in (1, 8))
    halves = planned(Place(CUDA, torch.bfloat16, 8), **{"parallel.replicas": 4})
    parameters = Sizes.of(QWEN3_4B).parameters
    for plan, shards in ((alone, 1), (eight, 8), (halves, 2)):
        rows = plan.memory
        assert [rows[name] * shards for name in ("fp32 master weights", "Adam moments")] == within(
            1e-6, [4 * parameters, 8 * parameters]
        )
    own, copy = "weights", "engine's own copy of the weights"
    assert (alone.memory[own], eight.memory[copy]) == (2 * parameters, 2 * parameters)
    assert copy not in alone.memory and own not in eight.memory
    layer, gathered = Sizes.of(QWEN3_4B).layer, "layers gathered from the others"
    assert 2 * 2 * layer < eight.memory[gathered] - 2 * 2560 * 151_936 < 8 * 2 * layer  # the embedding stays
    assert gathered not in alone.memory
    assert alone.operations == eight.operations
    assert "fp32 master weights" not in planned(Place(CPU, torch.float32)).memory  # the weights are
    assert planned(Place(CPU, torch.float32, 2)).memory["fp32 master weights"] == 2 * parameters
    assert eight.learner_seconds(0.5) == within(1e-6, eight.operations["learner"] / 8 / (0.5 * 989e12))
    assert alone.learner_seconds(MEASURED_MFU) > 8 * eight.learner_seconds(0.5)
    assert planned(Place(CPU, torch.bfloat16)).learner_seconds(0.5) is None

    offloaded = planned(Place(CUDA, torch.bfloat16, 8), **{"parallel.offload": True})
    assert offloaded.host_memory - eight.host_memory == within(1e-6, 2 * parameters)
    with pytest.raises(ValueError, match="replicas must divide"):
        planned(Place(CUDA, torch.bfloat16, 8), **{"parallel.replicas": 3})


def test_a_frozen_copy_is_there_only_for_a_kl_term_without_adapters():
    place, beta = Place(CUDA, torch.bfloat16), {"loss.beta": 0.1}
    assert planned(place, **beta).memory["reference model"] == 2 * Sizes.of(QWEN3_4B).parameters
    adapted = planned(place, **beta, **{"lora.rank": 8}).memory
    assert "reference model" not in adapted
    assert adapted["engine's own copy of the weights"] == 2 * Sizes.of(QWEN3_4B).parameters
    plain = planned(place).memory
    assert "reference model" not in plain
    head = "logits, lm_head's gradient"  # which is frozen where there are adapters; else summed up in fp32, then bf16
    assert plain[head] - adapted[head] == (4 + 2) * QWEN3_4B.vocab_size * QWEN3_4B.hidden_size


@pytest.mark.parametrize("window, roles", [(1, "both"), ("all", "agent1")])
def test_the_learner_computes_the_longest_dialogues(window, roles):
    """Dialogues as long as they may be, packed as the trainer packs them."""
    shape = DialogueConfig(max_rounds=2, window=window, max_tokens=9)
    config = Config(dialogue=shape, rollout=RolloutConfig(scenarios=2, group_size=3)).model_copy(
        update={"loss": Config().loss.model_copy(update={"train_roles": roles})}
    )
    lengths = Lengths(utterance_prompt=2020, utterance_prefix=2000, completion_prompt=120, judge_prompt=0)
    plan = make_plan(config, QWEN3_4B, lengths, Place(CPU, torch.float32))
    samples = []
    for scenario in range(2):
        for turn in [turn for _ in range(3) for turn in range(4) if roles == "both" or turn % 2 == 0]:
            shown = min(turn, 4 if window == "all" else window)
            prompt = 2020 + shown * (9 + 16)
            agent = AGENTS[turn % 2]
            samples.append(TurnSample((0,) * prompt, (0,) * 9, (0.0,) * 9, 1.0, (scenario, agent), prefix_len=2000))
    work = Work.of_batches(pack(samples, max_tokens=100_000))
    assert plan.learned_tokens == work.tokens + len(samples)  # the last of an utterance is never an input
    arithmetic = Model.of(QWEN3_4B)
    assert plan.operations["learner"] == within(0.01, arithmetic.flop(work))
    one, many = (
        make_plan(config.model_copy(update={"lora": LoRAConfig(rank=rank)}), QWEN3_4B, lengths, plan.place).operations
        for rank in (1, 65)
    )
    weight_gradients = 2 * (arithmetic.matrices * work.tokens + arithmetic.head * work.trained)
    assert one["learner"] == within(0.01, arithmetic.flop(work) - weight_gradients)
    assert many["learner"] - one["learner"] == 6 * 64 * Sizes.of(QWEN3_4B).sides * plan.learned_tokens
    if roles == "both":  # everything that is spoken is learned; the rest are six completions
        rest = plan.operations["rollout"] - arithmetic.forward(work)
        completion = 120 + 4 * 25 + config.dialogue.completion_max_tokens
        longest = config.dialogue.completion_max_tokens
        expected = arithmetic.forward(Work(6 * completion, 6 * longest, 6 * completion**2 // 2))
        assert rest == within(0.02, expected)


def test_what_is_computed_again_or_besides_counts():
    place = Place(CUDA, torch.bfloat16)

    def learner(**overrides: object) -> int:
        return planned(place, **overrides).operations["learner"]

    once = learner()
    assert learner(**{"optimizer.recompute": "full"}) == within(1e-9, once * 4 / 3)
    assert learner(**{"optimizer.updates": 3, "loss.beta": 0.1}) == within(1e-9, once * (3 + 1 / 3))


@pytest.fixture
def folder_14b(tmp_path) -> Path:
    """All that a plan needs of Qwen3-14B, but with another tokenizer."""
    QWEN3_14B.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(SMOLLM2).save_pretrained(tmp_path)
    return tmp_path


def dry_run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    code = train.main([*map(str, arguments), "--dry-run"])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_dry_run_answers_for_a_cluster_that_is_not_here(folder_14b, tmp_path, capsys):
    paper = ["--config", "configs/paper.yaml", "--model.path", folder_14b, "--runs", tmp_path / "runs"]
    code, said, wrong = dry_run(capsys, *paper, "--processes", 16, "--model.device", "cuda")
    assert (code, wrong) == (0, "")
    assert yaml.safe_load(said.split("\nplan")[0])["lora"]["quantize"] is True
    assert "memory of each of 16 process(es), on cuda" in said
    rows = {line[:38].strip(): line[38:].strip() for line in said.splitlines()}
    assert rows["frozen weights"] == "9.37 GiB"  # 13.2e9 parameters in 4 bits, 1.56e9 in bf16, 64e6 of adapters
    assert rows["engine's own copy of the weights"] == "27.51 GiB"
    assert rows["key-value cache"] == "5.00 GiB"
    assert "42% of 989 TFLOP/s, as measured on one H200" in said
    assert not (tmp_path / "runs").exists()


def test_dry_run_shows_the_plan_of_what_does_not_fit_and_says_so(folder_14b, capsys):
    paper = ["--config", "configs/paper.yaml", "--model.path", folder_14b, "--model.device", "cpu"]
    code, said, wrong = dry_run(capsys, *paper, "--engine.cache_tokens", 10**9)
    assert code == 2
    assert "memory in all" in said
    assert wrong.startswith("error: the run needs about") and wrong.count("\n") == 1


def test_a_run_may_take_all_there_is():
    plan = planned(Place(CUDA, torch.bfloat16))
    replace(plan, place=replace(plan.place, available=plan.needed)).require_room()
    with pytest.raises(ValueError, match="the run needs about"):
        replace(plan, place=replace(plan.place, available=plan.needed - 1)).require_room()


def test_arguments_of_a_dry_run_are_refused_elsewhere(capsys):
    for arguments, says in (
        (["--processes", "2"], "are for --dry-run"),
        (["--mfu", "0.3"], "are for --dry-run"),
        (["--dry-run", "--processes", "0"], "have to be positive"),
        (["--dry-run", "--mfu", "0"], "have to be positive"),
    ):
        with pytest.raises(SystemExit) as caught:
            train.main(arguments)
        assert caught.value.code == 2
        assert says in capsys.readouterr().err
