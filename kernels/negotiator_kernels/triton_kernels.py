"""The Triton backends of the fused loss."""

from __future__ import annotations

from negotiator_kernels import fused, triton_exponentials, triton_gemm, triton_objective

# Logits of a tile by the vendor's matmul, exponentials by a row kernel.
VENDOR_GEMM = fused.Kernels(
    triton_exponentials.exponentials,
    triton_exponentials.entropy_gradient_,
    triton_objective.objective_gradient,
    bf16_inputs=True,
    bf16_values=True,
)
# Both in one kernel.
FUSED_GEMM = VENDOR_GEMM._replace(exponentials=triton_gemm.exponentials)
