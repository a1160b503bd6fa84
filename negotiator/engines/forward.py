"""A forward pass of the embedded engine: the newest tokens of many sequences, whose earlier ones are in the cache.

T  tokens in the pass, sequence after sequence    R  rows whose logits are wanted
D  hidden size                                    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from negotiator.attention import use_negotiator_attention
from negotiator.engines.kv_cache import KVCache, PagedLayout, Reservation
from negotiator_kernels.linear import PackedLinears


class Span(NamedTuple):
    """Tokens start .. end of a sequence, to be computed in this pass."""

    reservation: Reservation
    start: int
    end: int
    tokens: Sequence[int]


class Forward(Protocol):
    """One way to compute the model."""

    def __call__(self, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        """Logits [R, V], fp32, after the tokens that `rows` number through the pass.

        Keys and values of all T tokens are in the cache afterwards.
        """
        ...

    def weights_changed(self) -> None:
        """The model's parameters are not what they were: whatever was made from them is made again."""
        ...


class HuggingFaceForward:
    """Any causal LM, through its own module."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        """Raises ValueError for a model whose attention or logits would come out wrong."""
        use_negotiator_attention(model)
        self._model: Any = model
        self._cache = cache
        self._head_fp32: torch.Tensor | None = None
        self._linears: PackedLinears | None = None

    @torch.no_grad()
    def __call__(self, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        if self._linears is None:
            self._linears = PackedLinears(self._model.parameters())
        device = self._model.device
        ids = [token for span in spans for token in span.tokens]
        positions = [position for span in spans for position in range(span.start, span.end)]
        with self._linears:
            output = self._model.get_decoder()(
                torch.tensor([ids], device=device),
                position_ids=torch.tensor([positions], device=device),
                layout=PagedLayout.build(self._cache, [(span.reservation, span.start, span.end) for span in spans]),
                use_cache=False,
            )
            return self._logits(output.last_hidden_state[0, list(rows)])

    def weights_changed(self) -> None:
        self._head_fp32 = self._linears = None

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [R, V] of hidden states [R, D], in fp32 without a rounding to the model's dtype on the way."""
        weight: torch.Tensor = self._model.get_output_embeddings().weight
        if weight.dtype == torch.float32:
            return F.linear(hidden, weight)
        if weight.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        if self._head_fp32 is None:
            self._head_fp32 = weight.float()
        return hidden.float() @ self._head_fp32.T
