"""Decoding on a GPU: passes recorded as CUDA graphs against the same passes launched kernel by kernel, and what sharing
a prefix saves the attention.

Part of `python -m benchmarks.gpu`. Weights are random: none of the times depends on them.

B sequences decode; GROUP of them at a time have their first tokens in common. Hq, Hkv and D as in `triton_attention`.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from negotiator.config import EngineConfig
from negotiator.engines.cuda_graphs import GraphedForward
from negotiator.engines.forward import Forward, HuggingFaceForward, Span
from negotiator.engines.kv_cache import KVCache, Reservation
from negotiator_kernels import sample, triton_attention
from negotiator_kernels.attention import paged_attention_reference
from negotiator_kernels.sampling import Backend

GROUP = 8
OWN = 96  # tokens that a sequence has room for after the common ones
MODELS: dict[str, PretrainedConfig] = {
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "Qwen3-0.6B": Qwen3Config(
        vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40_960, tie_word_embeddings=True,
    ),
}  # fmt: skip
RUNNING = (8, 32, 128)
PREFIXES = (256, 2048)
# Errors of attention, relative to the norm, and differences of bf16 logits, whose own size is about 1.
ATTENTION_LIMITS = {torch.float32: 5e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
LOGIT_LIMIT = 0.1
STEPS = 24
CALLS = 20


class Row(NamedTuple):
    model: str
    running: int
    prefix: int
    what: str
    ms: float
    tokens_per_s: float | None  # None for parts of a pass


def make_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def reserve(cache: KVCache, running: int, prefix: int) -> list[Reservation]:
    """B sequences whose common tokens are cached; all keys and values are noise."""
    rng = random.Random(0)
    cache.keys.normal_()
    cache.values.normal_()
    found = []
    for _ in range(-(-running // GROUP)):
        common = rng.choices(range(1000), k=prefix)
        first = cache.reserve(common, prefix)
        assert first is not None
        cache.share(first, common)
        cache.release(first)
        for _ in range(GROUP):
            own = cache.reserve(common, prefix + OWN)
            assert own is not None and own.shared == prefix
            found.append(own)
    return found[:running]


def decode(forward: Forward, sequences: list[Reservation], length: int) -> torch.Tensor:
    """One pass: token `length` of each sequence."""
    return forward([Span(s, length, length + 1, [7]) for s in sequences], range(len(sequences)))


def measure_passes(name: str, model: PreTrainedModel, running: int, prefix: int) -> tuple[list[Row], float]:
    """Times of a pass and of drawing its tokens, and the largest difference between the logits of both ways."""
    limits = EngineConfig(max_running=running, cache_tokens=running * (prefix + OWN), prefill_tokens=1024)
    cache = KVCache(model, limits.cache_tokens)
    sequences = reserve(cache, running, prefix)
    ways: dict[str, Forward] = {
        "kernel by kernel": HuggingFaceForward(model, cache),
        "graphs": GraphedForward(model, cache, limits),
    }
    rows, last = [], []
    for what, forward in ways.items():
        for step in range(3):
            logits = decode(forward, sequences, prefix + step)
        start = time.perf_counter()
        for step in range(3, 3 + STEPS):
            logits = decode(forward, sequences, prefix + step)
            logits.argmax(-1).tolist()  # as generation has to wait for them
        seconds = (time.perf_counter() - start) / STEPS
        rows.append(Row(name, running, prefix, what, seconds * 1e3, running / seconds))
        last.append(logits.clone())
    ones = torch.ones(running, device=model.device)
    seeds = torch.arange(running, device=model.device)
    backends: tuple[tuple[str, Backend], ...] = (("sampling", "auto"), ("sampling, reference", "reference"))
    for what, backend in backends:
        call = functools.partial(sample, last[0], ones, 0.95 * ones, seeds, seeds, backend)
        rows.append(Row(name, running, prefix, what, milliseconds(call, model.device), None))
    return rows, float((last[0] - last[1]).abs().max())


def attention_problem(
    config: PretrainedConfig, running: int, prefix: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[np.ndarray]]:
    """q, keys, values of one layer and the slots of each sequence."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = -(-running // GROUP)
    pool = np.random.default_rng(0).permutation(groups * prefix + running * OWN)
    common, own = pool[: groups * prefix].reshape(groups, prefix), pool[groups * prefix :].reshape(running, OWN)
    slots = [np.concatenate([common[i // GROUP], own[i]]) for i in range(running)]
    torch.manual_seed(0)
    q = torch.randn(running, heads, dim, device=device, dtype=dtype)
    k, v = (torch.randn(len(pool), kv_heads, dim, device=device, dtype=dtype) for _ in range(2))
    return q, k, v, slots


def attention_tables(q: torch.Tensor, k: torch.Tensor, slots: list[np.ndarray], share: bool) -> triton_attention.Tables:
    flat, group = np.concatenate(slots).astype(np.int32), q.shape[1] // k.shape[1]
    lengths = np.array([len(s) for s in slots])
    plan = triton_attention.plan(np.ones_like(lengths), lengths, group, flat if share else None)
    tables = triton_attention.empty_tables(len(q), len(flat), q.shape[1], k.shape[1], q.shape[2], q.device)
    for table, values in ((tables.slots, flat), (tables.queries, plan.queries), (tables.pieces, plan.pieces)):
        table[: len(values)].copy_(torch.from_numpy(values))
    return tables


def measure_attention(
    name: str, config: PretrainedConfig, running: int, prefix: int, device: torch.device
) -> list[Row]:
    """Attention of one layer, with the common keys read once for a group and once for each sequence."""
    q, k, v, slots = attention_problem(config, running, prefix, device, torch.bfloat16)
    rows = []
    for what, share in (("attention of a layer, prefix shared", True), ("attention of a layer, apart", False)):
        tables = attention_tables(q, k, slots, share)
        ms = milliseconds(recorded(lambda tables=tables: triton_attention.attend(q, k, v, tables, 0.1), device), device)
        rows.append(Row(name, running, prefix, what, ms, None))
    return rows


def attention_error(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> float:
    """Relative to the reference in fp64."""
    q, k, v, slots = attention_problem(config, 2 * GROUP + 1, 300, device, dtype)
    found = triton_attention.attend(q, k, v, attention_tables(q, k, slots, share=True), 0.3)
    flat = torch.from_numpy(np.concatenate(slots)).to(device)
    keys = torch.tensor([0, *np.cumsum([len(s) for s in slots])])
    exact = paged_attention_reference(q.double(), k.double(), v.double(), flat, keys, torch.arange(len(q) + 1), 0.3)
    return float((found - exact).norm() / exact.norm())


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call among many."""
    call()
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / CALLS


def recorded(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same call, which takes no longer than the GPU."""
    if device.type != "cuda":
        return call
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
