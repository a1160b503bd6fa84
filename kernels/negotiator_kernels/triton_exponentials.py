# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""`exponentials` around the vendor's matmul, and `entropy_gradient_`: Triton kernels that read each value once.

A tile of logits makes a round trip through memory in fp32; `triton_gemm` saves it.

Shapes: C rows, D hidden size, V vocabulary, T columns of a tile of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from negotiator_kernels import exponentials as reference

# 16 values a thread and step, so that four 16-byte loads are under way before the first of them is needed.
BLOCK, WARPS = 4096, 8

LOG2_E = tl.constexpr(1.4426950408889634)
# The exponential of anything lower is 0 in fp32. Logarithms are raised to it before they are multiplied by their
# exponential, because 0 times minus infinity is NaN.
LOWEST = tl.constexpr(-200.0)


def exponentials(
    hidden: Tensor, weight: Tensor, anchors: Tensor, temperature: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `negotiator_kernels.exponentials`; fp32 and bf16 operands."""
    return reference.exponentials(hidden, weight, anchors, temperature, out, tile_exponentials)


def tile_exponentials(
    logits: Tensor, anchors: Tensor, temperature: float, values: Tensor | None, sums: Tensor, moments: Tensor
) -> None:
    """See `negotiator_kernels.exponentials`; all but `values` fp32."""
    rows, columns = logits.shape
    if rows > 0:
        _tile_exponentials[(rows,)](
            logits, anchors, values, sums, moments, columns, logits.stride(0),
            0 if values is None else values.stride(0), 1 / temperature,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _tile_exponentials(
    logits,  # [C, T] fp32
    anchors,  # [C] fp32
    values,  # [C, T] written, None if only the sums are wanted
    sums,  # [C] fp32, added to
    moments,  # [C] fp32, added to
    columns,
    logits_stride,
    values_stride,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    anchor = tl.load(anchors + row)
    logits += row * logits_stride
    if values is not None:
        values += row * values_stride
    sum_ = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        # The logits are not needed again, the exponentials only after all tiles: neither should stay in a cache.
        logit = tl.load(logits + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        log = logit * inverse_temperature - anchor
        value = tl.exp2(log * LOG2_E)
        if values is not None:
            tl.store(values + column, value.to(values.dtype.element_ty), mask=inside, cache_modifier=".cs")
        sum_ += value
        moment += value * tl.maximum(log, LOWEST)
    tl.store(sums + row, tl.load(sums + row) + tl.sum(sum_))
    tl.store(moments + row, tl.load(moments + row) + tl.sum(moment))


def entropy_gradient_(values: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """See `negotiator_kernels.exponentials`; fp32 and bf16 values, alpha and beta fp32."""
    rows, vocabulary = values.shape
    if rows > 0:
        grid = (rows, triton.cdiv(vocabulary, BLOCK))
        _entropy_gradient[grid](values, alpha, beta, vocabulary, values.stride(0), BLOCK=BLOCK, num_warps=WARPS)


@triton.jit
def _entropy_gradient(
    values,  # [C, V] changed in place
    alpha,  # [C] fp32
    beta,  # [C] fp32
    vocabulary,
    values_stride,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    values += row * values_stride
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    value = tl.load(values + column, mask=inside, other=0.0).to(tl.float32)
    log = tl.maximum(tl.log(value), LOWEST)
    result = value * (tl.load(alpha + row) + tl.load(beta + row) * log)
    tl.store(values + column, result.to(values.dtype.element_ty), mask=inside)
