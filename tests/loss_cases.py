"""Problems for the loss, shared by its tests and those of its backends.

N rows, D hidden size, V vocabulary, as in `negotiator.loss`.
"""

from __future__ import annotations

from typing import Any

import torch

from negotiator.loss import GRPOLoss, grpo_loss, token_logprobs

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
# What a run may switch on besides the loss type; every off-policy log-ratio below crosses the clip on both sides.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "truncate": {"importance": "truncate", "importance_cap": 1.2},
    "mask": {"importance": "mask", "importance_cap": 1.3},
    "beta": {"beta": 0.3},
    "entropy": {"entropy_coef": 0.2, "temperature": 1.6},
    "clip": {"clip_low": 0.1, "clip_high": 0.4},
    "denominator": {"denominator": 17.0},
    "all": {
        "importance": "truncate", "importance_cap": 1.2, "beta": 0.3, "entropy_coef": 0.2, "temperature": 0.7,
        "denominator": 9.5,
    },
}  # fmt: skip


def problem(n: int = 37, d: int = 16, v: int = 101, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Arguments in fp64. Sequences are interleaved and of unequal length; the old policy is near, the engine nearer."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(n, d), normal(v, d) * scale / d**0.5
    logprobs, _ = token_logprobs(
        hidden, weight, targets := torch.randint(0, v, (n,), generator=g), torch.ones(n, dtype=torch.bool), 0.7
    )
    sequence_ids = torch.randint(0, 4, (n,), generator=g).clamp(min=1) * 1000
    return {
        "hidden": hidden,
        "lm_head_weight": weight,
        "targets": targets,
        "advantages": normal(4)[sequence_ids // 1000],
        "mask": torch.rand(n, generator=g) < 0.6,
        "sampling_logprobs": logprobs + 0.3 * normal(n),
        "old_logprobs": logprobs + 0.4 * normal(n),
        "ref_logprobs": logprobs + 0.5 * normal(n),
        "sequence_ids": sequence_ids,
    }


def options(args: dict[str, torch.Tensor], variant: str, off_policy: bool) -> dict[str, Any]:
    drop = () if off_policy else ("old_logprobs",)
    return {**{k: v for k, v in args.items() if k not in drop}, **VARIANTS[variant]}


def gradients(loss_args: dict[str, Any]) -> tuple[GRPOLoss, torch.Tensor, torch.Tensor]:
    hidden = loss_args["hidden"].detach().requires_grad_()
    weight = loss_args["lm_head_weight"].detach().requires_grad_()
    result = grpo_loss(**{**loss_args, "hidden": hidden, "lm_head_weight": weight})
    return result, *torch.autograd.grad(result.loss, (hidden, weight))


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if k in ("hidden", "lm_head_weight") else v for k, v in args.items()}


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())
