"""The public door to the GRPO loss: what it means, argument checks, compaction to trained rows, choice of backend.

Shapes: N rows (packed tokens), M of them trained, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from negotiator_kernels import fused, reference
from negotiator_kernels.availability import native_cuda_off_reason, native_off_reason, triton_off_reason
from negotiator_kernels.reference import BackendResult, Importance, LossSpec, LossType, Rows

Backend = Literal["auto", "reference", "torch", "native", "triton", "triton_gemm"]


@dataclass(frozen=True, slots=True)
class LossMetrics:
    """Means over the trained rows of one call; tensors are 0-d and stay on the device.

    A ratio counts as clipped where the clip cuts its gradient: low when it fell too far with a negative advantage,
    high when it rose too far with a positive one (cispo: with any).
    """

    ratio_mean: Tensor
    ratio_max: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    approx_kl: Tensor  # k3 estimate of KL(old policy || policy), nats a token
    importance_mean: Tensor  # weight that corrects for the engine's probabilities, after truncation or masking
    trained_tokens: int
    skipped_rows: int  # rows whose gradient was known to be zero, so that they took no backward matmul


@dataclass(frozen=True, slots=True)
class GRPOLoss:
    """`loss` is differentiable with respect to hidden and lm_head_weight; the other fields carry no gradient."""

    loss: Tensor  # scalar
    logprobs: Tensor  # [N], NaN where masked
    entropy: Tensor  # [N] nats, NaN where masked
    metrics: LossMetrics


def grpo_loss(
    hidden: Tensor,
    lm_head_weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    sampling_logprobs: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sequence_ids: Tensor | None = None,
    temperature: float = 1.0,
    loss_type: LossType = "dapo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    importance: Importance = "none",
    importance_cap: float = 2.0,
    denominator: float | None = None,
    backend: Backend = "auto",
) -> GRPOLoss:
    """Policy-gradient loss of the rows where `mask` is True, from hidden states and the output embedding.

    Per trained row t of sequence i, with logp_t = log-softmax(hidden_t . lm_head_weight / temperature)[targets_t]:

    - ratio rho_t = exp(logp_t - old_t); without `old_logprobs` old_t is logp_t detached (ratio 1, gradient flows).
    - dapo, grpo, dr_grpo: -min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t).
    - cispo: -stopgrad(min(rho_t, 1 + clip_high)) A_t logp_t.
    - gspo: the dapo term once a sequence, with the ratio exp(mean_t(logp_t - old_t)).
    - with `sampling_logprobs`, w_t = exp(old_t - sampling_t), detached, multiplies the term: `truncate` takes
      min(w_t, importance_cap), `mask` drops rows outside [1 / importance_cap, importance_cap]; gspo takes the
      sequence's mean. Without `sampling_logprobs`, or with `none`, nothing is corrected.
    - beta (exp(d_t) - d_t - 1), d_t = ref_t - logp_t, and -entropy_coef H_t are added, never multiplied by w_t; gspo
      averages them over a sequence.
    - dapo, cispo, dr_grpo sum over rows, grpo sums over sequences the mean over rows, gspo sums over sequences; the sum
      is divided by `denominator`.

    Args:
        hidden: [N, D] floating point, any strides.
        lm_head_weight: [V, D], dtype of `hidden`. May be the input embedding's own tensor.
        targets: [N] int64 token ids.
        advantages: [N]. gspo: equal over the rows of a sequence.
        mask: [N] bool. Rows with False cost no matmul, get a gradient of exactly 0, and may hold anything.
        sampling_logprobs, old_logprobs, ref_logprobs: [N] log-probs of the engine, of the policy before this step's
            first update, and of the reference policy (needed when beta > 0), at this temperature.
        sequence_ids: [N] integers, one value a sequence; needed for grpo, dr_grpo and gspo. grpo and gspo need all the
            rows of a sequence in one call.
        denominator: see `default_denominator`, which it defaults to over this call's rows. An optimizer step of several
            calls (micro-batches, ranks) passes the same one, counted over the whole step, to each. At least 1 is used.
        backend: `reference` holds all logits, the others a bounded chunk: `torch` is plain PyTorch, `native` the C++
            and CUDA of `csrc/`, `triton` the vendor's matmul and Triton kernels around it, `triton_gemm` a Triton
            matmul that takes the exponentials itself. `auto` is the first that can run: on a GPU of triton, native,
            torch; elsewhere of native, torch.

    The dtype inside is at least fp32 and fp64 for fp64 inputs; gradients come back in the dtypes of the inputs.
    An empty mask gives loss 0 with zero gradients.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the backend cannot run.
    """
    _check_model(hidden, lm_head_weight, targets, mask, temperature)
    per_row = {
        "advantages": advantages,
        "sampling_logprobs": sampling_logprobs,
        "old_logprobs": old_logprobs,
        "ref_logprobs": ref_logprobs,
    }
    for name, values in per_row.items():
        if values is not None:
            _check_rows(name, values, hidden)
            _require(values.is_floating_point(), f"{name} must be floating point, not {values.dtype}")
    _check_choice("loss_type", loss_type, LossType)
    _check_choice("importance", importance, Importance)
    for name, value in (("clip_low", clip_low), ("clip_high", clip_high), ("beta", beta), ("denominator", denominator)):
        if value is not None:
            _require(math.isfinite(value) and value >= 0, f"{name} must be finite and at least 0, not {value}")
    _require(math.isfinite(entropy_coef), f"entropy_coef must be finite, not {entropy_coef}")
    _require(importance_cap >= 1, f"importance_cap must be at least 1, not {importance_cap}")
    _require(beta == 0 or ref_logprobs is not None, "beta > 0 needs ref_logprobs")
    by_sequence = loss_type in ("grpo", "dr_grpo", "gspo")
    if sequence_ids is not None:
        _check_rows("sequence_ids", sequence_ids, hidden)
        _require(not sequence_ids.is_floating_point(), f"sequence_ids must be integers, not {sequence_ids.dtype}")
    _require(not by_sequence or sequence_ids is not None, f"loss_type {loss_type!r} needs sequence_ids")

    trained = mask.nonzero().squeeze(1)
    _check_targets(targets, trained, lm_head_weight)
    dtype = torch.promote_types(hidden.dtype, torch.float32)

    def compact(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().index_select(0, trained).to(dtype)

    sequence, sequence_rows, counts = None, None, [len(trained)]
    if by_sequence and sequence_ids is not None:
        ids = sequence_ids.index_select(0, trained)
        _, sequence, sequence_rows = torch.unique(ids, return_inverse=True, return_counts=True)
        if denominator is None:
            counts = sequence_rows.tolist()
    rows = Rows(
        targets=targets.index_select(0, trained),
        advantages=advantages.detach().index_select(0, trained).to(dtype),
        sampling_logprobs=compact(sampling_logprobs),
        old_logprobs=compact(old_logprobs),
        ref_logprobs=compact(ref_logprobs),
        sequence=sequence,
        sequence_rows=sequence_rows,
    )
    spec = LossSpec(
        loss_type=loss_type,
        temperature=temperature,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        entropy_coef=entropy_coef,
        importance=importance,
        importance_cap=importance_cap,
        denominator=default_denominator(loss_type, counts) if denominator is None else max(denominator, 1.0),
    )
    x, kernels = hidden.index_select(0, trained), _kernels(backend, hidden)
    if kernels is None:
        result = reference.grpo_loss(x, lm_head_weight, rows, spec)
    else:
        result = fused.grpo_loss(x, lm_head_weight, rows, spec, kernels)
    return GRPOLoss(
        loss=result.loss,
        logprobs=_spread(result.logprobs, trained, len(mask)),
        entropy=_spread(result.entropy, trained, len(mask)),
        metrics=_metrics(result, rows, spec),
    )


def default_denominator(loss_type: LossType, row_counts_per_sequence: Sequence[int]) -> float:
    """What the summed loss of an optimizer step is divided by, from the trained rows of each of its sequences.

    dapo, cispo: all trained rows. dr_grpo: sequences times the longest one's rows. grpo, gspo: sequences. A sequence
    without trained rows does not count. Never below 1. Counts must cover all micro-batches and ranks of the step.
    """
    counts = [count for count in row_counts_per_sequence if count > 0]
    if loss_type in ("dapo", "cispo"):
        total = sum(counts)
    elif loss_type == "dr_grpo":
        total = len(counts) * max(counts, default=0)
    else:
        total = len(counts)
    return float(max(total, 1))


def token_logprobs(
    hidden: Tensor, lm_head_weight: Tensor, targets: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probs [N] of `targets` and entropies [N] in nats, NaN where `mask` is False; no gradient, bounded memory.

    For old and reference log-probs: the very numbers that `grpo_loss` computes with the backend `auto`. Arguments and
    errors as there.
    """
    _check_model(hidden, lm_head_weight, targets, mask, temperature)
    trained = mask.nonzero().squeeze(1)
    _check_targets(targets, trained, lm_head_weight)
    x, y = hidden.detach().index_select(0, trained), targets.index_select(0, trained)
    kernels = _kernels("auto", hidden)
    assert kernels is not None
    logprobs, entropy = fused.token_logprobs(x, lm_head_weight.detach(), y, temperature, kernels)
    return _spread(logprobs, trained, len(mask)), _spread(entropy, trained, len(mask))


def off_reason(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """None when `backend` can run on hidden states of this device and dtype, else why not."""
    if backend in ("auto", "reference", "torch"):
        return None
    if dtype == torch.float64:
        return "it computes in fp32; hidden is fp64"
    if backend == "native" and device.type == "cpu":
        return native_off_reason()
    if device.type != "cuda":
        return f"it runs on {'CPUs and ' if backend == 'native' else ''}CUDA devices; hidden is on {device}"
    if backend == "native":
        return native_cuda_off_reason()
    if backend == "triton_gemm" and dtype != torch.bfloat16:
        return f"it multiplies bf16; hidden is {dtype}"
    if backend == "triton_gemm" and torch.cuda.get_device_capability(device)[0] not in (9, 10):
        return "it needs the copy engine and the shared memory of compute capability 9 or 10"
    return triton_off_reason()


def auto_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `auto` stands for, for hidden states of this device and dtype."""
    order = ("triton", "native", "torch") if device.type == "cuda" else ("native", "torch")
    return next(name for name in order if off_reason(name, device, dtype) is None)


def _kernels(backend: str, hidden: Tensor) -> fused.Kernels | None:
    """The one place where backends are chosen, and where one that cannot run says why. None is the reference."""
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend!r}")
    if backend == "auto":
        backend = auto_backend(hidden.device, hidden.dtype)
    elif (reason := off_reason(backend, hidden.device, hidden.dtype)) is not None:
        raise ValueError(f"backend {backend} is off: {reason}")
    if backend == "reference":
        return None
    if backend == "torch":
        return fused.TORCH._replace(bf16_inputs=hidden.is_cuda, bf16_values=hidden.is_cuda)
    if backend == "native":
        from negotiator_kernels import native

        return native.CUDA if hidden.is_cuda else native.CPU
    from negotiator_kernels import triton_kernels

    return triton_kernels.FUSED_GEMM if backend == "triton_gemm" else triton_kernels.VENDOR_GEMM


def _spread(values: Tensor, trained: Tensor, total: int) -> Tensor:
    """[M] values back at their rows of [N]; NaN elsewhere."""
    return values.new_full((total,), math.nan).index_copy(0, trained, values)


@torch.no_grad()
def _metrics(result: BackendResult, rows: Rows, spec: LossSpec) -> LossMetrics:
    ratio = reference.policy_ratio(result.logprobs, rows, spec)
    advantages = rows.advantages
    if spec.loss_type == "gspo":
        assert rows.sequence is not None
        ratio = ratio[rows.sequence]
    low, high = ratio < 1 - spec.clip_low, ratio > 1 + spec.clip_high
    if spec.loss_type == "cispo":
        low = torch.zeros_like(low)
    else:
        low, high = low & (advantages < 0), high & (advantages > 0)
    gap = reference.log_ratio(result.logprobs, rows)
    weights = reference.importance_weights(result.logprobs, rows, spec)

    trained = len(ratio)
    return LossMetrics(
        ratio_mean=ratio.sum() / max(trained, 1),
        ratio_max=ratio.max() if trained else ratio.sum(),
        clip_fraction_low=low.sum() / max(trained, 1),
        clip_fraction_high=high.sum() / max(trained, 1),
        approx_kl=(reference.bounded_exp(gap) - gap - 1).sum() / max(trained, 1),
        importance_mean=torch.ones_like(ratio).mean() if weights is None else weights.sum() / max(trained, 1),
        trained_tokens=trained,
        skipped_rows=result.skipped_rows,
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _check_choice(name: str, value: str, choices: object) -> None:
    _require(value in get_args(choices), f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")


def _check_rows(name: str, values: Tensor, hidden: Tensor) -> None:
    shape = [hidden.shape[0]]
    _require(list(values.shape) == shape, f"{name} must have shape {shape}, a value a row, not {list(values.shape)}")
    _require(values.device == hidden.device, f"{name} must be on {hidden.device} like hidden, not {values.device}")


def _check_model(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> None:
    _require(hidden.dim() == 2, f"hidden must have shape [N, D], not {list(hidden.shape)}")
    _require(hidden.is_floating_point(), f"hidden must be floating point, not {hidden.dtype}")
    _require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[1],
        f"lm_head_weight must have shape [V, {hidden.shape[1]}] to match hidden, not {list(weight.shape)}",
    )
    _require(weight.dtype == hidden.dtype, f"lm_head_weight must be {hidden.dtype} like hidden, not {weight.dtype}")
    _require(
        weight.device == hidden.device, f"lm_head_weight must be on {hidden.device} like hidden, not {weight.device}"
    )
    _check_rows("targets", targets, hidden)
    _require(targets.dtype == torch.int64, f"targets must be int64, not {targets.dtype}")
    _check_rows("mask", mask, hidden)
    _require(mask.dtype == torch.bool, f"mask must be bool, not {mask.dtype}")
    _require(math.isfinite(temperature) and temperature > 0, f"temperature must be above 0, not {temperature}")


def _check_targets(targets: Tensor, trained: Tensor, weight: Tensor) -> None:
    """Trained targets are in the vocabulary. On CUDA the look-up itself faults: a check here would stall on it."""
    if targets.is_cuda or len(trained) == 0:
        return
    low, high = targets.index_select(0, trained).aminmax()
    _require(
        low.item() >= 0 and high.item() < weight.shape[0],
        f"targets must be in [0, {weight.shape[0]}) where mask is True, not [{low.item()}, {high.item()}]",
    )
