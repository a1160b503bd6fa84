"""Adapters against the arithmetic they stand for, against peft reading what was saved, and the reference they leave."""

import pytest
import torch
from helpers import made_up_samples, tiny_llama
from peft import PeftModel
from tiny_run import Together, metrics, write_config, write_model
from transformers import AutoModelForCausalLM

from negotiator import merge, train
from negotiator.config import LoRAConfig, LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.lora import load_adapted, save_adapter, without_adapters
from negotiator.packing import pack

CPU = torch.device("cpu")
PROMPT = torch.arange(12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    model.save_pretrained(folder)
    return folder


def adapted(base, dtype=torch.float32, **config):
    return load_adapted(base, CPU, dtype, LoRAConfig(rank=4, alpha=8, **config))


def trained(base, dtype=torch.float32, steps=2, **config) -> Learner:
    learner = Learner(adapted(base, dtype, **config), OptimizerConfig(lr=1e-2, warmup_steps=0), LossConfig(), 0.7)
    for step in range(steps):
        assert learner.step(step, pack(made_up_samples(seed=step), 100), 60.0).updated
    return learner


def logits(model) -> torch.Tensor:
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        return model(PROMPT).logits.float()


def plain_with(base, weights) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    own = dict(model.named_parameters())
    for name, tensor in weights:
        own.pop(name).data.copy_(tensor)
    assert not own, "some weights were not delivered"
    return model


@pytest.mark.parametrize("quantize", [False, True])
def test_new_adapters_change_nothing_and_every_process_makes_the_same(base, quantize):
    one, other = adapted(base, quantize=quantize), adapted(base, quantize=quantize)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    if not quantize:
        assert torch.equal(logits(one), logits(tiny_llama()))


@pytest.mark.parametrize("quantize", [False, True])
def test_merged_weights_are_what_the_adapted_model_computes(base, quantize):
    learner = trained(base, quantize=quantize)
    found = logits(plain_with(base, learner.weights()))
    expected = logits(learner.model)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    with without_adapters(learner.model):
        assert (logits(learner.model) - expected).abs().max() > 0.1
    assert torch.equal(logits(learner.model), expected), "the adapters did not come back"


def test_only_adapters_are_trained_in_fp32(base):
    before = {name: p.detach().clone() for name, p in adapted(base, torch.bfloat16).named_parameters()}
    learner = trained(base, torch.bfloat16)
    assert all(".lora_" in name and master.dtype == torch.float32 for name, master in learner.masters.items())
    moved = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(learner.masters)


def test_peft_reads_what_was_saved(base, tmp_path):
    learner = trained(base)
    save_adapter(learner.model, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tmp_path)
    found = dict(model.merge_and_unload().named_parameters())
    for name, tensor in learner.weights():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def letters(scenario, dialogue) -> float:
    """A reward that differs between dialogues."""
    return sum(len(utterance.text) for utterance in dialogue.utterances) % 6


def test_a_run_saves_adapters_goes_on_with_them_and_can_be_merged(tmp_path, capsys):
    write_model(tmp_path / "model")
    write_config(tmp_path / "config.yaml", tmp_path / "model")
    rewards = ("--judge.agreement", "negotiator.judges.rewards:after_a_round", "--judge.reward", f"{__name__}:letters")
    given = ("--config", tmp_path / "config.yaml", "--runs", tmp_path, "--lora.rank", 4, "--loss.beta", 0.1, *rewards)

    def run(*arguments: object) -> None:
        one = Together(train.main, [([*map(str, arguments)],)], tmp_path / "output")
        assert one.wait() == [0], one.printed()

    run(*given, "--name", "whole", "--steps", 3)
    run(*given, "--name", "halves", "--steps", 2)
    run("--resume", tmp_path / "halves", "--steps", 3)
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert metrics(tmp_path / "whole")[2]["reference_kl"] > 0

    saved = tmp_path / "whole" / "checkpoints" / "step-3"
    assert merge.main([str(saved), "--to", str(tmp_path / "merged")]) == 0
    base, merged = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("model", "merged")
    )
    moved = {n for (n, a), b in zip(base.named_parameters(), merged.parameters(), strict=True) if not torch.equal(a, b)}
    assert moved == {n for n, p in base.named_parameters() if p.dim() == 2 and "embed" not in n}
    assert merge.main([str(tmp_path / "model"), "--to", str(tmp_path / "again")]) == 2
    assert "holds no adapters" in capsys.readouterr().err
