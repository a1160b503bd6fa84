"""The GRPO loss against those of Liger and TRL: other people's code, written from the same papers.

Both take padded sequences [B, T] with one advantage a sequence. Where they and the contract word a setting differently
(cispo's clip is a ratio there and a distance from 1 here; gspo is grpo with ratios per sequence; the denominator counts
sequences that have no trained row), the tests translate.

Shapes: B sequences of T tokens, N = BT, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from torch import Tensor
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.providers import providers
from negotiator.loss import grpo_loss

B, T, D, V = 6, 11, 24, 203
CAP = 1.2
BACKENDS = ["reference", *(p.name for p in providers() if p.kind == "ours" and not p.off_reason(torch.device("cpu")))]
LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "on_policy": {"old_logprobs": None},
    "temperature": {"temperature": 0.7},
    "clip": {"clip_low": 0.1, "clip_high": 0.4},
    "beta": {"beta": 0.3},
    "truncate": {"importance": "truncate", "importance_cap": CAP},
    "all": {"temperature": 1.4, "clip_low": 0.3, "beta": 0.1, "importance": "truncate", "importance_cap": CAP},
}
Found = tuple[Tensor, Tensor | None, Tensor, Tensor]  # loss, log-probs [N], d_hidden [N, D], d_weight [V, D]


def problem() -> dict[str, Any]:
    """fp32 arguments. Log-ratios cross the clip on both sides, and one sequence has no trained row."""
    g = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    hidden, weight, targets = 2 * normal(B * T, D), normal(V, D) / D**0.5, torch.randint(0, V, (B * T,), generator=g)
    logprobs = torch.log_softmax(hidden @ weight.T, dim=1).gather(1, targets[:, None]).squeeze(1)
    mask = torch.rand(B * T, generator=g) < 0.5
    mask[T : 2 * T] = False
    return {
        "hidden": hidden,
        "lm_head_weight": weight,
        "targets": targets,
        "advantages": normal(B).repeat_interleave(T),
        "mask": mask,
        "sampling_logprobs": logprobs + 0.4 * normal(B * T),
        "old_logprobs": logprobs + 0.2 * normal(B * T),
        "ref_logprobs": logprobs + 0.5 * normal(B * T),
        "sequence_ids": torch.arange(B).repeat_interleave(T),
        "loss_type": "dapo",
        "temperature": 1.0,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "beta": 0.0,
        "entropy_coef": 0.0,
        "importance": "none",
    }


def ours(args: dict[str, Any], backend: str) -> Found:
    hidden, weight = leaves(args)
    denominator = {"grpo": B, "gspo": B, "dr_grpo": B * T}.get(args["loss_type"])
    inputs = {**args, "hidden": hidden, "lm_head_weight": weight, "denominator": denominator, "backend": backend}
    result = grpo_loss(**inputs)
    return result.loss.detach(), result.logprobs, *torch.autograd.grad(result.loss, (hidden, weight))


def leaves(args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return args["hidden"].clone().requires_grad_(), args["lm_head_weight"].clone().requires_grad_()


def by_sequence(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.view(B, T)


def importance_ratio(args: dict[str, Any], now: Tensor) -> Tensor | None:
    """[B, T]: what both call the correction of vLLM's probabilities. `now` [N]: log-probs, for on-policy."""
    if args["importance"] == "none":
        return None
    old = now if args["old_logprobs"] is None else args["old_logprobs"]
    return (old - args["sampling_logprobs"]).exp().clamp(max=CAP).view(B, T)


def upper_clip(args: dict[str, Any]) -> float:
    return float(args["clip_high"] + (args["loss_type"] == "cispo"))


def loss_and_level(args: dict[str, Any]) -> tuple[str, str]:
    return ("grpo", "sequence") if args["loss_type"] == "gspo" else (args["loss_type"], "token")


def liger(args: dict[str, Any], now: Tensor) -> Found:
    hidden, weight = leaves(args)
    loss_type, level = loss_and_level(args)
    module = LigerFusedLinearGRPOLoss(
        beta=args["beta"],
        compiled=False,
        use_ref_model=args["beta"] > 0,
        epsilon_low=args["clip_low"],
        epsilon_high=upper_clip(args),
        loss_type=loss_type,
        max_completion_length=T,
        importance_sampling_level=level,
        temperature=args["temperature"],
    )
    loss, _ = module(
        hidden.view(B, T, D),
        weight,
        by_sequence(args["targets"]),
        by_sequence(args["mask"]).float(),
        by_sequence(args["advantages"])[:, 0],
        ref_per_token_logps=by_sequence(args["ref_logprobs"]),
        old_per_token_logps=by_sequence(args["old_logprobs"]),
        vllm_is_ratio=importance_ratio(args, now),
    )
    return loss.detach(), None, *torch.autograd.grad(loss, (hidden, weight))


def trl(args: dict[str, Any], now: Tensor) -> Found:
    """The trainer's own `_compute_loss`, with a stand-in for the trainer: evaluating, alone, in one process."""
    hidden, weight = leaves(args)
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(
        hidden, weight, None, args["targets"], args["temperature"], 64, None, 1.0, ("log_probs", "entropy")
    )
    loss_type, level = loss_and_level(args)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs.view(B, T), entropy.view(B, T), None),
        _metrics={"eval": defaultdict(list)},
        _entropy_bonus_enabled=args["entropy_coef"] != 0,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        beta=args["beta"],
        entropy_coef=args["entropy_coef"],
        epsilon_low=args["clip_low"],
        epsilon_high=upper_clip(args),
        importance_sampling_level=level,
        loss_type=loss_type,
        max_completion_length=T,
        model=SimpleNamespace(training=False),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_adaptive_entropy=False,
        use_vllm=args["importance"] != "none",
        vllm_importance_sampling_correction=True,
    )
    nothing = torch.zeros(B, 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": by_sequence(args["targets"]),
        "completion_mask": by_sequence(args["mask"]).long(),
        "advantages": by_sequence(args["advantages"])[:, 0],
        "old_per_token_logps": by_sequence(args["old_logprobs"]),
        "ref_per_token_logps": by_sequence(args["ref_logprobs"]),
        "importance_sampling_ratio": importance_ratio(args, now),
        "num_items_in_batch": args["mask"].sum(),
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), logprobs.detach(), *torch.autograd.grad(loss, (hidden, weight))


def assert_close(found: Found, expected: Found, trained: Tensor) -> None:
    """Norms within 1e-5 of each other, masked rows exactly without a gradient."""
    loss, logprobs, d_hidden, d_weight = found
    expected_loss, expected_logprobs, *expected_gradients = expected
    assert abs(loss - expected_loss) <= 1e-5 * max(1.0, abs(expected_loss))
    if expected_logprobs is not None:
        assert (logprobs - expected_logprobs)[trained].abs().max() <= 1e-5
    assert not d_hidden[~trained].any()
    for mine, theirs in zip((d_hidden, d_weight), expected_gradients, strict=True):
        assert theirs.norm() > 1e-3
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_liger_and_trl_agree(loss_type: str, variant: str, backend: str) -> None:
    args = {**problem(), "loss_type": loss_type, **VARIANTS[variant]}
    found = ours(args, backend)
    now = found[1].nan_to_num()
    assert_close(found, liger(args, now), args["mask"])
    assert_close(found, trl(args, now), args["mask"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])  # TRL's bonus is the mean over tokens whatever the loss type
def test_trl_agrees_on_the_entropy_bonus(loss_type: str, backend: str) -> None:
    args = {**problem(), "loss_type": loss_type, "entropy_coef": 0.3, "temperature": 0.8}
    found = ours(args, backend)
    assert_close(found, trl(args, found[1].nan_to_num()), args["mask"])
