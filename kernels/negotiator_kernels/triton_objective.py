# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""`objective_gradient` in one launch instead of autograd's dozens. gspo, whose rows depend on each other, is not here.

Shapes: M rows, S sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from negotiator_kernels import reference
from negotiator_kernels.reference import LossSpec, Rows

BLOCK, WARPS = 128, 4
MAX_LOG_RATIO = tl.constexpr(reference.MAX_LOG_RATIO)  # no gradient passes beyond it, so that exponentials may overflow


def objective_gradient(logprobs: Tensor, entropy: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
    """[2, M] fp32: d loss / d log-prob and d loss / d entropy of `negotiator_kernels.reference.objective`."""
    assert spec.loss_type != "gspo"
    assert logprobs.dtype == torch.float32
    out = torch.empty(2, *logprobs.shape, dtype=torch.float32, device=logprobs.device)
    if logprobs.numel() > 0:
        by_sequence = spec.loss_type == "grpo"
        weighted = spec.importance != "none" and rows.sampling_logprobs is not None
        _objective_gradient[(triton.cdiv(len(logprobs), BLOCK),)](
            logprobs,
            rows.advantages,
            rows.sampling_logprobs if weighted else None,
            rows.old_logprobs,
            rows.ref_logprobs if spec.beta != 0 else None,
            rows.sequence if by_sequence else None,
            rows.sequence_rows if by_sequence else None,
            out,
            len(logprobs),
            1.0 - spec.clip_low,
            1.0 + spec.clip_high,
            float(spec.beta),
            float(spec.entropy_coef),
            1.0 / spec.importance_cap,
            float(spec.importance_cap),
            float(spec.denominator),
            CISPO=spec.loss_type == "cispo",
            TRUNCATE=spec.importance == "truncate",
            BLOCK=BLOCK,
            num_warps=WARPS,
        )
    return out


# Chunks start and end anywhere: no version of its own for a count or for addresses that 16 divides.
@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=[
        "logprobs", "advantages", "sampling_logprobs", "old_logprobs", "ref_logprobs", "sequence", "sequence_rows",
    ],
)  # fmt: skip
def _objective_gradient(
    logprobs,  # [M] fp32
    advantages,  # [M] fp32
    sampling_logprobs,  # [M] fp32, None without importance weights
    old_logprobs,  # [M] fp32, None when on-policy
    ref_logprobs,  # [M] fp32, None without the k3 penalty
    sequence,  # [M] int64, None unless a row counts by the length of its sequence
    sequence_rows,  # [S] int64, None as `sequence` is
    out,  # [2, M] fp32, written
    count,
    ratio_low,
    ratio_high,
    beta,
    entropy_coef,
    weight_low,
    weight_high,
    denominator,
    CISPO: tl.constexpr,
    TRUNCATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < count
    logprob = tl.load(logprobs + row, mask=inside)
    advantage = tl.load(advantages + row, mask=inside)
    old = tl.load(old_logprobs + row, mask=inside) if old_logprobs is not None else logprob
    log_ratio = logprob - old
    ratio = tl.exp(log_ratio)
    if CISPO:
        slope = tl.where(ratio > ratio_high, ratio_high, ratio) * advantage
    else:
        # Where autograd has a choice it splits a minimum's gradient evenly between equal sides, passes all of it at the
        # ends of a clamp, and lets NaN through a minimum; so here.
        clipped = tl.where(ratio < ratio_low, ratio_low, tl.where(ratio > ratio_high, ratio_high, ratio))
        plain_term, clipped_term = ratio * advantage, clipped * advantage
        tie = tl.where(plain_term == clipped_term, 0.5, 1.0)
        of_plain = tl.where(plain_term > clipped_term, 0.0, tie)
        of_clipped = tl.where(clipped_term > plain_term, 0.0, tie)
        of_clipped = tl.where((ratio >= ratio_low) & (ratio <= ratio_high), of_clipped, 0.0)
        slope = tl.where(log_ratio <= MAX_LOG_RATIO, (of_plain + of_clipped) * advantage * ratio, 0.0)
    if sampling_logprobs is not None:
        weight = tl.exp(old - tl.load(sampling_logprobs + row, mask=inside))
        if TRUNCATE:
            weight = tl.where(weight > weight_high, weight_high, weight)
        else:
            weight = tl.where((weight >= weight_low) & (weight <= weight_high), weight, 0.0)
        slope *= weight
    d_logprob = -slope
    if ref_logprobs is not None:
        ref_gap = tl.load(ref_logprobs + row, mask=inside) - logprob
        d_logprob += beta * (1.0 - tl.where(ref_gap <= MAX_LOG_RATIO, tl.exp(ref_gap), 0.0))
    share = tl.full((BLOCK,), 1.0, tl.float32) / denominator
    if sequence is not None:
        number = tl.load(sequence + row, mask=inside, other=0)
        share /= tl.load(sequence_rows + number).to(tl.float32)
    tl.store(out + row, d_logprob * share, mask=inside)
    tl.store(out + count + row, -entropy_coef * share, mask=inside)
