"""The fused loss in the C++ and CUDA of `csrc/`.

On the CPU one kernel multiplies, exponentiates and sums, so that no logit reaches memory. On a GPU the product is the
vendor library's, and a kernel takes the exponentials of what it wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from negotiator_kernels import exponentials as reference
from negotiator_kernels import fused
from negotiator_kernels.fused import Kernels


def exponentials(
    hidden: Tensor, weight: Tensor, anchors: Tensor, temperature: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `negotiator_kernels.exponentials`; fp32 and bf16 operands."""
    if hidden.is_cuda:
        return reference.exponentials(hidden, weight, anchors, temperature, out, _tile_exponentials)
    if out is not None:
        torch.ops.negotiator_kernels.ask_for_large_pages(out)
    sums, moments = torch.ops.negotiator_kernels.exponentials(hidden, weight, anchors, temperature, out)
    return sums, moments


def _tile_exponentials(
    logits: Tensor, anchors: Tensor, temperature: float, values: Tensor | None, sums: Tensor, moments: Tensor
) -> None:
    with torch.cuda.device(logits.device):
        stream = torch.cuda.current_stream().cuda_stream
        torch.ops.negotiator_kernels.tile_exponentials(logits, anchors, temperature, values, sums, moments, stream)


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """See `negotiator_kernels.fused.add_product`; a and b fp32 or bf16, summed up in fp32.

    torch's own product of bf16 on the CPU rounds its sums to bf16. In fp32 the two are equally fast.
    """
    if a.dtype == b.dtype == dtype:
        return fused.add_product(total, a, b, dtype)
    total = torch.zeros(a.shape[0], b.shape[1], dtype=dtype) if total is None else total
    torch.ops.negotiator_kernels.add_product(total, a, b)
    return total


# A processor without instructions for bf16 widens it as it packs what it multiplies.
CPU = Kernels(
    exponentials,
    add_product=add_product,
    bf16_inputs=True,
    bf16_values=bool(torch.cpu.get_capabilities().get("avx512_bf16", False)),
)
CUDA = Kernels(exponentials, bf16_inputs=True, bf16_values=True)
