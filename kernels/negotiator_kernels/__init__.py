"""Operators of the negotiation trainer. Every operator has a plain torch reference in the same file."""

from negotiator_kernels.attention import paged_attention
from negotiator_kernels.sampling import sample

__all__ = ["paged_attention", "sample"]
