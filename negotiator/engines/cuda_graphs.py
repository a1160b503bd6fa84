"""The embedded engine's path on a GPU: a whole forward pass is one CUDA graph, so that launching it costs nothing.

A model of 30 layers launches some 700 kernels a pass, which takes Python longer than it takes the GPU to run them. Here
every pass, of decoding, prompts or both, is padded to one of a few sizes; the first of a size is recorded, later ones
are replayed. What differs between them, such as tokens, slots and lengths, is put at fixed addresses beforehand. So
are the weights: updates in place reach the graphs.

T  tokens in the pass, padded    R  rows whose logits are wanted, padded    D  hidden size    V  vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from negotiator.attention import use_negotiator_attention
from negotiator.config import EngineConfig
from negotiator.engines.forward import Span
from negotiator.engines.kv_cache import KVCache
from negotiator_kernels import triton_attention

# Up to here a pass takes the time of reading the weights, whatever its number of tokens, so that padding is free.
FREE_TOKENS = 256


def padded_size(tokens: int) -> int:
    """Tokens of the pass that is recorded for so many."""
    return 1 << (tokens - 1).bit_length() if tokens <= FREE_TOKENS else -(-tokens // FREE_TOKENS) * FREE_TOKENS


def graphed_forward_off_reason(model: PreTrainedModel) -> str | None:
    """Why passes of this model, which is on a GPU, cannot be recorded; None if they can. Tries one."""
    use_negotiator_attention(model)
    forward = GraphedForward(model, KVCache(model, 1), EngineConfig(max_running=1, cache_tokens=1, prefill_tokens=1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward.compute(1)
    except RuntimeError as error:
        return f"{type(model).__name__} waits for the GPU within a pass: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


class GraphedForward:
    """See `engines.forward.Forward`. The logits it returns are good until the next pass.

    Without a GPU it computes the same passes without recording them.
    """

    def __init__(self, model: PreTrainedModel, cache: KVCache, config: EngineConfig) -> None:
        self._model: Any = model
        self._cache = cache
        self._most_rows = config.max_running
        device, heads = model.device, model.config.num_attention_heads
        _, _, kv_heads, dim = cache.keys.shape
        self._group = heads // kv_heads
        tokens = padded_size(config.prefill_tokens + config.max_running)
        longest = min(config.cache_tokens, getattr(model.config, "max_position_embeddings", config.cache_tokens))
        self._tables = triton_attention.empty_tables(tokens, config.max_running * longest, heads, kv_heads, dim, device)
        self._ids = torch.zeros(tokens, dtype=torch.int64, device=device)
        self._rows = torch.zeros(config.max_running, dtype=torch.int64, device=device)
        self._logits = torch.empty(config.max_running, model.config.vocab_size, dtype=torch.float32, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._weights: list[int] = []  # addresses that are in the graphs

    @torch.no_grad()
    def __call__(self, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        ids = [token for span in spans for token in span.tokens]
        size = padded_size(len(ids))
        slots = np.concatenate(
            [span.reservation.slots[: span.end] for span in spans], dtype=np.int32, casting="same_kind"
        )
        plan = triton_attention.plan(
            np.array([span.end - span.start for span in spans]),
            np.array([span.end for span in spans]),
            self._group,
            slots,
        )
        # From memory that is not pinned: such copies have left it when they return, so nothing has to wait for them.
        for table, values in (
            (self._ids, np.array(ids)),
            (self._rows, np.pad(rows, (0, len(self._rows) - len(rows))).astype(np.int64)),
            (self._tables.slots, slots),
            (self._tables.queries, np.pad(plan.queries, ((0, size - len(ids)), (0, 0)))),
            (self._tables.pieces, plan.pieces),
        ):
            table[: len(values)].copy_(torch.from_numpy(values))
        if self._ids.is_cuda:
            self._graph(size).replay()
        else:
            self.compute(size)
        return self._logits[: len(rows)]

    def weights_changed(self) -> None:
        """Graphs read the weights where they were; only if they have moved are passes recorded anew."""
        if self._weights != self._addresses():
            self._graphs.clear()

    @torch.no_grad()
    def compute(self, size: int) -> None:
        """A pass over `size` tokens. Everything it reads and writes has a fixed address; nothing in it waits."""
        tables = self._tables._replace(queries=self._tables.queries[:size])
        positions = (tables.queries[:, 0].long() - 1).clamp(min=0)
        output = self._model.get_decoder()(
            self._ids[None, :size], position_ids=positions[None], layout=_Layout(self._cache, tables), use_cache=False
        )
        hidden = output.last_hidden_state[0]
        rows = min(size, self._most_rows)
        wanted, weight = hidden.index_select(0, self._rows[:rows]), self._model.get_output_embeddings().weight
        if weight.dtype == torch.float32:
            torch.mm(wanted, weight.T, out=self._logits[:rows])
        else:  # without a rounding to the model's dtype on the way
            torch.mm(wanted, weight.T, out_dtype=torch.float32, out=self._logits[:rows])

    def _graph(self, size: int) -> torch.cuda.CUDAGraph:
        if not self._graphs:
            print("recording CUDA graphs of forward passes, one of each size when it first occurs", flush=True)
            self._weights = self._addresses()
        if size not in self._graphs:
            # Once for real, on a stream of its own: kernels are compiled and libraries take memory, which must not
            # happen while a graph is recorded.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.compute(size)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            others = next(iter(self._graphs.values()), None)  # one pass after the other can use the same memory
            with torch.cuda.graph(graph, pool=others.pool() if others else None):
                self.compute(size)
            self._graphs[size] = graph
        return self._graphs[size]

    def _addresses(self) -> list[int]:
        return [weight.data_ptr() for weight in self._model.parameters()]


class _Layout(NamedTuple):
    """See `negotiator.attention.Layout`."""

    cache: KVCache
    tables: triton_attention.Tables

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if k.shape[1::2] != keys.shape[1:] or v.shape[1::2] != values.shape[1:]:
            raise ValueError(
                f"the model's keys and values are {tuple(k.shape[1::2])} and {tuple(v.shape[1::2])} a token, "
                f"its config says {tuple(keys.shape[1:])}; choose a model with ordinary (grouped-query) attention"
            )
        triton_attention.store(k[0].transpose(0, 1), v[0].transpose(0, 1), keys, values, self.tables)
        return triton_attention.attend(q[0].transpose(0, 1), keys, values, self.tables, scale)[None]
