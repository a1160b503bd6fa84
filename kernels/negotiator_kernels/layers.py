"""What stands between the matrix products of a layer in training on a CPU, native and in fp32: norm, rotation, gate.

Each is one pass over its operands, forward and backward, and keeps nothing but these for the backward pass. Their
references are the Hugging Face modules. Tensors are fp32 on the CPU.

    B sequences    T tokens    H heads    d head dimension    W width of a row
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension: x [..., W], weight [W]."""
    out: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; both of one shape."""
    out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return out


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, H, T, d] and k [B, Hkv, T, d], turned by cos and sin [B or 1, T, d]; no gradient for the latter.

    The results lie in memory as [B, T, H, d], as do the outputs of a projection and what attention wants.
    """
    # torch types no `apply`
    turned_q, turned_k = (_Rotation.apply(x, cos, sin) for x in (q, k))  # type: ignore[no-untyped-call]
    return turned_q, turned_k


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x = x.contiguous()
        out: Tensor
        out, factors = torch.ops.negotiator_kernels.rms_norm(x, weight, epsilon)
        ctx.save_for_backward(x, weight, factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = torch.ops.negotiator_kernels.rms_norm_backward(dout.contiguous(), *ctx.saved_tensors)
        return dx, dweight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out: Tensor = torch.ops.negotiator_kernels.swiglu(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        dgate, dup = torch.ops.negotiator_kernels.swiglu_backward(dout.contiguous(), *ctx.saved_tensors)
        return dgate, dup


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, _, tokens, _ = x.shape
        cos, sin = (part.expand(batch, tokens, -1).flatten(0, 1).contiguous() for part in (cos, sin))
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(dout, cos, sin, True), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    by_token = x.transpose(1, 2).contiguous()  # a view, for what comes out of a projection or of attention
    out: Tensor = torch.ops.negotiator_kernels.rotate_heads(by_token.flatten(0, 1), cos, sin, backward)
    return out.view_as(by_token).transpose(1, 2)
