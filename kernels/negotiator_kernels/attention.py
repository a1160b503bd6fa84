"""Attention over keys and values that lie scattered in a pool of slots, for decoding and prefill alike.

T = packed queries, S = segments, Hq = query heads, Hkv = key/value heads, G = Hq / Hkv, D = head dimension,
n = queries of one segment, L = keys of one segment.
Inference only: no operator here has a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from negotiator_kernels.availability import native_off_reason, triton_off_reason


def paged_attention(
    q: torch.Tensor,  # [T, Hq, D]
    k_cache: torch.Tensor,  # [slots of the pool, Hkv, D]
    v_cache: torch.Tensor,  # [slots of the pool, Hkv, D]
    slots: torch.Tensor,  # [keys of all segments] int32 or int64
    slot_starts: torch.Tensor,  # [S + 1] int32 or int64
    query_starts: torch.Tensor,  # [S + 1] int32 or int64
    scale: float,
    backend: Literal["auto", "reference", "native", "triton"] = "auto",
) -> torch.Tensor:  # [T, Hq, D]
    """Causal attention of each segment's queries over the segment's own keys.

    Segment s keeps its keys, in order, at `slots[slot_starts[s]:slot_starts[s+1]]` and its queries at
    `q[query_starts[s]:query_starts[s+1]]`. The queries are the last positions of the keys: query i of n sees the
    first L - n + i + 1 of L keys. Query head h reads key/value head h // G. Sums are kept in fp32.

    `slots` lives where `q` does; the two `starts` are read on the host, so keep them on the CPU.
    `auto` is `native` on the CPU and `reference` elsewhere.
    Raises ValueError for shapes, dtypes and devices that do not fit together; starts or slots that point outside are a
    ValueError of the reference and a RuntimeError of the native operator.
    """
    _check(q, k_cache, v_cache, slots, slot_starts, query_starts)
    if backend == "auto":
        backend = "native" if q.device.type == "cpu" and native_off_reason() is None else "reference"
    if backend == "reference":
        return paged_attention_reference(q, k_cache, v_cache, slots, slot_starts, query_starts, scale)
    if backend == "triton":
        if (reason := triton_off_reason()) is not None:
            raise ValueError(f"backend triton is off: {reason}")
        if q.device.type != "cuda" or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"backend triton takes fp32, bf16 and fp16 on a GPU, not {q.dtype} on {q.device}")
        from negotiator_kernels import triton_attention

        return triton_attention.paged_attention(q, k_cache, v_cache, slots, slot_starts, query_starts, scale)
    if backend != "native":
        raise ValueError(f"backend must be auto, reference, native or triton, not {backend!r}")
    if (reason := native_off_reason()) is not None:
        raise ValueError(f"backend native is off: {reason}")
    if q.device.type != "cpu" or q.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"backend native takes fp32 and bf16 on the CPU, not {q.dtype} on {q.device}")
    out: torch.Tensor = torch.ops.negotiator_kernels.paged_attention(
        q, k_cache, v_cache, slots.long(), slot_starts.cpu().long(), query_starts.cpu().long(), scale
    )
    return out


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    slot_starts: torch.Tensor,
    query_starts: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """What `paged_attention` computes, in plain torch: one-query segments in one padded batch, others in turn."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    kv, qs = slot_starts.tolist(), query_starts.tolist()
    _check_starts("slot_starts", kv, len(slots))
    _check_starts("query_starts", qs, len(q))
    segments = range(len(qs) - 1)
    for s in segments:
        if qs[s + 1] - qs[s] > kv[s + 1] - kv[s]:
            raise ValueError(f"segment {s} has more queries than keys")
    decode = [s for s in segments if qs[s + 1] - qs[s] == 1]
    if decode:
        rows = torch.tensor([qs[s] for s in decode], device=q.device)
        first = torch.tensor([kv[s] for s in decode], device=q.device)
        length = torch.tensor([kv[s + 1] - kv[s] for s in decode], device=q.device)
        position = torch.arange(max(kv[s + 1] - kv[s] for s in decode), device=q.device)
        seen = position < length[:, None]  # [B, L]
        block = slots[torch.where(seen, first[:, None] + position, first[:, None])]
        out[rows] = _grouped_attention(q[rows][:, None], k_cache[block], v_cache[block], seen[:, None], scale)[:, 0]
    for s in segments:
        n, length_s = qs[s + 1] - qs[s], kv[s + 1] - kv[s]
        if n < 2:
            continue
        own = slots[kv[s] : kv[s + 1]]
        seen = torch.ones(n, length_s, dtype=torch.bool, device=q.device).tril(length_s - n)
        out[qs[s] : qs[s + 1]] = _grouped_attention(
            q[None, qs[s] : qs[s + 1]], k_cache[None, own], v_cache[None, own], seen[None], scale
        )[0]
    return out


def _grouped_attention(
    q: torch.Tensor,  # [B, n, Hq, D]
    k: torch.Tensor,  # [B, L, Hkv, D]
    v: torch.Tensor,  # [B, L, Hkv, D]
    seen: torch.Tensor,  # [B, n, L] bool
    scale: float,
) -> torch.Tensor:  # [B, n, Hq, D]
    """The G query heads of a key/value head become further queries, so that no key is repeated."""
    batch, n, heads, dim = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    grouped = q.view(batch, n, kv_heads, group, dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, group * n, dim)
    mask = seen.repeat(1, group, 1)[:, None]  # [B, 1, G * n, L]
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.view(batch, kv_heads, group, n, dim).permute(0, 3, 1, 2, 4).reshape(batch, n, heads, dim)


def _check(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    slot_starts: torch.Tensor,
    query_starts: torch.Tensor,
) -> None:
    if q.dim() != 3 or k_cache.dim() != 3:
        raise ValueError("q must be [T, Hq, D] and k_cache [slots, Hkv, D]")
    if v_cache.shape != k_cache.shape or k_cache.shape[2] != q.shape[2]:
        raise ValueError(f"k_cache {k_cache.shape}, v_cache {v_cache.shape} and q {q.shape} do not fit together")
    if q.shape[1] % k_cache.shape[1] != 0:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k_cache.shape[1]} key/value heads")
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(f"q, k_cache and v_cache must have one dtype, not {q.dtype}, {k_cache.dtype}, {v_cache.dtype}")
    if not q.device == k_cache.device == v_cache.device == slots.device:
        raise ValueError("q, k_cache, v_cache and slots must be on one device")
    for name, index in (("slots", slots), ("slot_starts", slot_starts), ("query_starts", query_starts)):
        if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be one-dimensional int32 or int64, not {index.dtype} {tuple(index.shape)}")
    if slot_starts.shape != query_starts.shape or slot_starts.numel() == 0:
        raise ValueError("slot_starts and query_starts must both be [S + 1]")


def _check_starts(name: str, starts: list[int], total: int) -> None:
    if starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise ValueError(f"{name} must rise from 0 to {total}")
