"""Attention of a packed batch in one pass over it, and its gradient.

    T  packed tokens    Hq query heads    Hkv key/value heads (Hq is a multiple)    D head dimension
    q, out, dout, dq [T, Hq, D]    k, v, dk, dv [T, Hkv, D]    lse [Hq, T], the log-sum-exp of each query's scores
    segments [S, 4] int64 on the CPU: start, end, prefix_start, prefix_end

The segments tile the batch. A token sees those of its segment up to itself, and its segment's prefix, which lies before
the segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

# `forward` and `backward` are native: fp32 on the CPU, contiguous; RuntimeError for anything else. What is summed up in
# which order depends on the segments alone, so the number of threads does not change a bit.


def forward(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out, lse"""
    out, lse = torch.ops.negotiator_kernels.packed_attention(q, k, v, segments, scale)
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, segments: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv"""
    dq, dk, dv = torch.ops.negotiator_kernels.packed_attention_backward(dout, q, k, v, out, lse, segments, scale)
    return dq, dk, dv


def reference(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out, lse in plain torch with a mask over all pairs; differentiable."""
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for start, end, prefix_start, prefix_end in segments.tolist():
        seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen[start:end, prefix_start:prefix_end] = True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = scale * torch.einsum("qhd,khd->hqk", q, k).masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)
