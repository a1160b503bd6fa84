# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""`paged_attention` for a GPU: keys that several queries share are read once for all of them, and nothing waits.

Keys are cut into pieces. A program multiplies one piece with a tile of queries that see it: the heads of a group, times
the sequences that have the piece in common (such as the prompt of a group of dialogues), or times consecutive tokens of
one prompt. It leaves each query a part of its sum, in fp32; a second kernel adds the parts up. Who reads what is found
out on the host by `plan`, once for all layers, and reaches the kernels through memory alone: a launch depends on sizes,
not on lengths, so that it can be recorded in a CUDA graph.

Inference only: no operator here has a gradient.

T = queries, S = sequences, L = keys of a sequence, Hq = query heads, Hkv = key/value heads, G = Hq / Hkv, D = head
dimension, N = pieces, P = parts of all queries.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

# Queries that a program multiplies at once: what 8 sequences of 4 heads for a key/value head fill, or 16 of 2.
TILE = 32
# Keys of a piece, or twice, four times, ... as many, until there are no more than SPARE_PARTS parts beyond one a query.
# That many are enough to keep all processors busy, and their number bounds the memory for them.
PIECE, SPARE_PARTS = 128, 2048
HEADER = 3  # numbers before the queries of a piece
PROGRAMS = 4  # a multiprocessor
MERGED = 16  # parts at a time


class Shape(NamedTuple):
    block: int  # keys of a step
    warps: int
    stages: int


# By the bytes of an element. fp32 is multiplied as tf32, three times for full precision, and spills in anything larger.
SHAPES = {2: Shape(block=64, warps=4, stages=3), 4: Shape(block=32, warps=8, stages=2)}
LOG2_E = 1.4426950408889634
# Takes the place of minus infinity as a maximum of no scores: it can be subtracted from itself.
LOWEST = tl.constexpr(-1e38)


class Plan(NamedTuple):
    """Which query reads which keys, and which program does it."""

    queries: NDArray[np.int32]  # [T, 4]: length (keys that it sees), first of its slots, first part, number of parts
    pieces: NDArray[np.int32]  # [1 + N, HEADER + TILE / G]: N; then first key, key after the last, which part; queries
    parts: int


class Tables(NamedTuple):
    """A plan where the kernels run, and room for what they leave each other.

    Everything may be longer than a plan needs, for the sake of fixed addresses. A query of length 0 is not there.
    """

    slots: Tensor  # [keys of all sequences] int32
    queries: Tensor  # as in `Plan`
    pieces: Tensor
    sums: Tensor  # [P, Hq, D] fp32: of the values, weighted by the softmax within the part
    logs: Tensor  # [P, Hq] fp32: of the sum of exponentials, to base 2


def plan(queries: NDArray[np.int64], keys: NDArray[np.int64], group: int, slots: NDArray[np.integer] | None) -> Plan:
    """The plan for sequences of `queries` [S] tokens, which are the last of their `keys` [S], and G = `group`.

    `slots` of all keys, in order, tell which sequences begin alike: a slot must not serve tokens that follow different
    ones. Without them every sequence counts as different.
    """
    sequence = np.repeat(np.arange(len(queries)), queries)  # [T]
    query = np.arange(len(sequence))
    length = keys[sequence] + query + 1 - queries.cumsum()[sequence]
    first_slot = _exclusive_sum(keys)[sequence]
    decoding = queries[sequence] == 1
    size = np.where(decoding, _piece(length[decoding]), _piece(length[~decoding]))
    parts = -(-length // size)
    first_part = _exclusive_sum(parts)
    of_query = np.stack((length, first_slot, first_part, parts), axis=1).astype(np.int32)

    # One entry for each query and piece, those of the same keys side by side.
    query = np.repeat(query, parts)
    part = np.arange(len(query)) - first_part[query]
    end = (part + 1) * size[query]
    keys_of = -1 - sequence[query]
    if slots is not None:  # where sequences have the last slot of a piece in common, they have all of it
        complete = decoding[query] & (end <= length[query])
        keys_of[complete] = slots[(first_slot[query] + end - 1)[complete]]
    order = np.lexsort((query, keys_of, part))
    query, part, end, keys_of = query[order], part[order], end[order], keys_of[order]
    differs = np.ones(len(query), dtype=bool)
    differs[1:] = (part[1:] != part[:-1]) | (keys_of[1:] != keys_of[:-1])
    place = np.arange(len(query))
    place = (place - np.maximum.accumulate(np.where(differs, place, 0))) % _queries_of_tile(group)
    number = (place == 0).cumsum()
    pieces = np.full((1 + (place == 0).sum(), HEADER + _queries_of_tile(group)), -1, dtype=np.int32)
    pieces[0, 0] = len(pieces) - 1
    pieces[number, 0], pieces[number, 1], pieces[number, 2] = end - size[query], end, part
    pieces[number, HEADER + place] = query
    return Plan(of_query, pieces, len(query))


def _piece(lengths: NDArray[np.int64]) -> int:
    """Keys of a piece for queries that see so many."""
    piece = PIECE
    while (-(-lengths // piece)).sum() > len(lengths) + SPARE_PARTS:
        piece *= 2
    return piece


def _exclusive_sum(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return counts.cumsum() - counts


def _queries_of_tile(group: int) -> int:
    """How many queries, of `group` heads each, fill a tile."""
    if group > TILE:
        raise ValueError(f"{group} query heads share a key/value head; the triton backend takes up to {TILE}")
    return TILE // int(triton.next_power_of_2(group))


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, slot_starts: Tensor, query_starts: Tensor, scale: float
) -> Tensor:
    """What `negotiator_kernels.paged_attention` computes. Which sequences begin alike is not looked for: see `plan`."""
    queries, keys = (starts.cpu().long().diff().numpy() for starts in (query_starts, slot_starts))
    needed = plan(queries, keys, q.shape[1] // k_cache.shape[1], slots=None)
    parts, heads, dim = needed.parts, q.shape[1], q.shape[2]
    tables = Tables(
        slots=slots.int(),
        queries=torch.from_numpy(needed.queries).to(q.device),
        pieces=torch.from_numpy(needed.pieces).to(q.device),
        sums=torch.empty(parts, heads, dim, dtype=torch.float32, device=q.device),
        logs=torch.empty(parts, heads, dtype=torch.float32, device=q.device),
    )
    return attend(q, k_cache, v_cache, tables, scale)


def empty_tables(tokens: int, keys: int, heads: int, kv_heads: int, dim: int, device: torch.device) -> Tables:
    """Room for any plan of up to so many queries and keys of all sequences; a plan of nothing is in it."""
    parts = tokens + 2 * SPARE_PARTS  # for prompts and for decoding
    return Tables(
        slots=torch.zeros(keys, dtype=torch.int32, device=device),
        queries=torch.zeros(tokens, 4, dtype=torch.int32, device=device),
        pieces=torch.zeros(1 + parts, HEADER + _queries_of_tile(heads // kv_heads), dtype=torch.int32, device=device),
        sums=torch.empty(parts, heads, dim, dtype=torch.float32, device=device),
        logs=torch.empty(parts, heads, dtype=torch.float32, device=device),
    )


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tables) -> None:
    """Puts the keys and values [T, Hkv, D] of each query's own token into the last slot that it sees."""
    count, heads, dim = k.shape
    _store[(count,)](
        k, v, k_cache, v_cache, tables.slots, tables.queries,
        *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2],
        HEADS=heads, DIM=dim, num_warps=1,
    )  # fmt: skip


def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tables, scale: float) -> Tensor:
    """Attention [T, Hq, D] of q [T, Hq, D] over the keys and values [slots of the pool, Hkv, D] that `tables` name.

    Queries that are not there get 0.
    """
    count, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    assert q.stride(2) == k_cache.stride(2) == v_cache.stride(2) == 1
    assert len(tables.queries) == count and tables.pieces.is_contiguous() and tables.queries.is_contiguous()
    out = torch.empty(count, heads, dim, dtype=q.dtype, device=q.device)
    shape = SHAPES[q.element_size()]
    programs = min((len(tables.pieces) - 1) * kv_heads, PROGRAMS * _multiprocessors(q.device))
    if count == 0:
        return out
    _attend_pieces[(programs,)](
        q, k_cache, v_cache, tables.slots, tables.queries, tables.pieces, tables.sums, tables.logs,
        scale * LOG2_E, *q.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2],
        KV_HEADS=kv_heads, GROUP=heads // kv_heads, DIM=dim, HEADER=HEADER, TILE=TILE, BLOCK=shape.block,
        UPCAST=not q.is_cuda, num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    _merge_parts[(count, heads)](tables.sums, tables.logs, tables.queries, out, DIM=dim, BLOCK=MERGED, num_warps=1)
    return out


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _store(
    k,  # [T, Hkv, D]
    v,  # [T, Hkv, D]
    k_cache,  # [slots of the pool, Hkv, D], written
    v_cache,  # [slots of the pool, Hkv, D], written
    slots,
    queries,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    k_cache_stride,
    k_cache_head_stride,
    v_cache_stride,
    v_cache_head_stride,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    query = tl.program_id(0)
    length = tl.load(queries + query * 4)
    if length > 0:
        slot = tl.load(slots + tl.load(queries + query * 4 + 1) + length - 1).to(tl.int64)
        head = tl.arange(0, triton.next_power_of_2(HEADS))[:, None]
        dim = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
        inside = (head < HEADS) & (dim < DIM)
        key = tl.load(k + query * k_stride + head * k_head_stride + dim, mask=inside)
        value = tl.load(v + query * v_stride + head * v_head_stride + dim, mask=inside)
        tl.store(k_cache + slot * k_cache_stride + head * k_cache_head_stride + dim, key, mask=inside)
        tl.store(v_cache + slot * v_cache_stride + head * v_cache_head_stride + dim, value, mask=inside)


@triton.jit
def _attend_pieces(
    q,  # [T, Hq, D]
    k_cache,  # [slots of the pool, Hkv, D]
    v_cache,  # [slots of the pool, Hkv, D]
    slots,
    queries,
    pieces,
    sums,  # written
    logs,  # written
    scale,  # of logarithms to base 2
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    HEADER: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, which multiplies bf16 wrongly
):
    HEADS: tl.constexpr = triton.next_power_of_2(GROUP)  # of a query, in the tile
    WIDTH: tl.constexpr = HEADER + TILE // HEADS
    # A tensor core adds up 16 products at a time.
    dim = tl.arange(0, 16 if DIM < 16 else triton.next_power_of_2(DIM))
    row = tl.arange(0, TILE)
    item = tl.program_id(0)
    items = tl.load(pieces) * KV_HEADS
    while item < items:
        piece = pieces + (1 + item // KV_HEADS) * WIDTH
        kv_head = item % KV_HEADS
        query = tl.load(piece + HEADER + row // HEADS)
        there = (query >= 0) & (row % HEADS < GROUP)
        end = tl.minimum(tl.load(queries + query * 4, mask=there, other=0), tl.load(piece + 1))  # of what it sees
        head = kv_head * GROUP + row % HEADS
        of_tile = there[:, None] & (dim[None, :] < DIM)
        x = tl.load(q + query[:, None] * q_stride + head[:, None] * q_head_stride + dim[None, :], mask=of_tile, other=0)
        # Any query of the piece tells where its slots are: they are the same.
        own_slots = slots + tl.load(queries + tl.load(piece + HEADER) * 4 + 1)
        last = tl.max(end)
        highest = tl.full((TILE,), LOWEST, tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        sum_ = tl.zeros((TILE, dim.shape[0]), tl.float32)
        for start in range(tl.load(piece), last, BLOCK):
            position = start + tl.arange(0, BLOCK)
            slot = tl.load(own_slots + position, mask=position < last, other=0).to(tl.int64)
            of_block = (position < last)[:, None] & (dim[None, :] < DIM)
            k = tl.load(
                k_cache + slot[:, None] * k_stride + kv_head * k_head_stride + dim[None, :], mask=of_block, other=0
            )
            v = tl.load(
                v_cache + slot[:, None] * v_stride + kv_head * v_head_stride + dim[None, :], mask=of_block, other=0
            )
            if UPCAST:
                x, k, v = x.to(tl.float32), k.to(tl.float32), v.to(tl.float32)
            log = tl.dot(x, k.T, input_precision="tf32x3") * scale
            log = tl.where(position[None, :] < end[:, None], log, float("-inf"))
            higher = tl.maximum(highest, tl.max(log, 1))
            factor = tl.exp2(highest - higher)
            weight = tl.exp2(log - higher[:, None])
            total = total * factor + tl.sum(weight, 1)
            sum_ = tl.dot(weight.to(v.dtype), v, sum_ * factor[:, None], input_precision="tf32x3")
            highest = higher
        part = tl.load(queries + query * 4 + 2, mask=there, other=0) + tl.load(piece + 2)
        place = (part * (KV_HEADS * GROUP) + head).to(tl.int64)
        tl.store(logs + place, highest + tl.log2(total), mask=there)
        tl.store(sums + place[:, None] * DIM + dim[None, :], sum_ / total[:, None], mask=of_tile)
        item += tl.num_programs(0)


@triton.jit
def _merge_parts(
    sums,
    logs,
    queries,
    out,  # [T, Hq, D], written
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    query, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first = tl.load(queries + query * 4 + 2)
    count = tl.load(queries + query * 4 + 3)
    dim = tl.arange(0, triton.next_power_of_2(DIM))
    highest = LOWEST
    total = 0.0
    sum_ = tl.zeros((dim.shape[0],), tl.float32)
    for start in range(0, count, BLOCK):
        number = start + tl.arange(0, BLOCK)
        place = ((first + number) * heads + head).to(tl.int64)
        log = tl.load(logs + place, mask=number < count, other=float("-inf"))
        inside = (number < count)[:, None] & (dim < DIM)[None, :]
        part = tl.load(sums + place[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
        higher = tl.maximum(highest, tl.max(log, 0))
        factor = tl.exp2(highest - higher)
        weight = tl.exp2(log - higher)
        total = total * factor + tl.sum(weight, 0)
        sum_ = sum_ * factor + tl.sum(weight[:, None] * part, 0)
        highest = higher
    result = tl.where(count > 0, sum_ / total, 0.0)
    place = (query * heads + head).to(tl.int64) * DIM + dim
    tl.store(out + place, result.to(out.dtype.element_ty), mask=dim < DIM)
