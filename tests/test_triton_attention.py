"""Triton's attention against the reference in fp64, and its plan against its promise; interpreted without a GPU.

S sequences, T queries, Hq query heads, Hkv key/value heads, D head dimension, as in `triton_attention`.
"""

from __future__ import annotations

import itertools
import math
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import let_scalars_bound_loops

from negotiator_kernels import paged_attention, triton_attention
from negotiator_kernels.attention import paged_attention_reference
from negotiator_kernels.triton_attention import HEADER, SPARE_PARTS, Tables, plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see conftest.py
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy
# Errors as a ratio of norms. Plain torch has 2e-7, 2.1e-4 and 1.7e-3, the last two from the rounding of the output.
# The interpreter cuts bf16 off where a GPU rounds; a GPU makes each fp32 product of three of tf32.
LIMITS = {
    torch.float32: 5e-7 if INTERPRETED else 2e-6,
    torch.float16: 2.6e-4,
    torch.bfloat16: 3.6e-3 if INTERPRETED else 2.5e-3,
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if INTERPRETED:
        let_scalars_bound_loops(monkeypatch)


@pytest.fixture
def short_pieces(monkeypatch):
    """Several steps a piece and several pieces a sequence in small shapes."""
    monkeypatch.setattr(triton_attention, "PIECE", 32)
    monkeypatch.setattr(triton_attention, "MERGED", 4)
    shapes = {size: shape._replace(block=16) for size, shape in triton_attention.SHAPES.items()}
    monkeypatch.setattr(triton_attention, "SHAPES", shapes)


# --- the plan ---------------------------------------------------------------------------------------------------------


def sequences_of(rng: random.Random, count: int, longest: int) -> list[np.ndarray]:
    """Slots as a radix tree gives them: some sequences go on from an earlier one, for as long as they like."""
    free = itertools.count()
    found: list[np.ndarray] = []
    for _ in range(count):
        before = rng.choice(found)[: rng.randint(0, longest)] if found and rng.random() < 0.8 else []
        most = longest - len(before)
        own = [next(free) for _ in range(most if rng.random() < 0.5 else rng.randint(not len(before), most))]
        found.append(np.array([*before, *own]))
    return found


@settings(deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 2, 3, 4, 8, 32]))
def test_a_plan_gives_each_query_its_keys_once(seed, group):
    rng = random.Random(seed)
    slots = sequences_of(rng, rng.randint(1, 12), rng.choice([5, 127, 128, 300, 3000]))
    queries = np.array([rng.choice([1, 1, 1, rng.randint(0, min(len(s), 70))]) for s in slots])
    keys = np.array([len(s) for s in slots])
    table = np.concatenate(slots)
    found = plan(queries, keys, group, table)
    sequence = np.repeat(np.arange(len(slots)), queries)
    seen = [[[] for _ in range(count)] for count in found.queries[:, 3]]
    assert found.parts == found.queries[:, 3].sum() <= len(sequence) + 2 * SPARE_PARTS
    assert found.pieces[0, 0] == len(found.pieces) - 1 <= found.parts
    for first, end, part, *of_piece in found.pieces[1:].tolist():
        base = found.queries[of_piece[0], 1]
        for query in of_piece:
            if query >= 0:
                assert seen[query][part] == []
                seen[query][part] += table[base + first : base + min(end, found.queries[query, 0])].tolist()
    for query, s in enumerate(sequence):
        visible = keys[s] - queries[: s + 1].sum() + query + 1
        assert all(seen[query])
        assert [slot for part in seen[query] for slot in part] == slots[s][:visible].tolist()
    assert sorted(found.queries[:, 2]) == found.queries[:, 2].tolist()
    assert (found.queries[:, 2] + found.queries[:, 3])[:-1].tolist() == found.queries[1:, 2].tolist()


def keys_read(found) -> int:
    lengths = found.queries[found.pieces[1:, HEADER:], 0]
    longest = np.where(found.pieces[1:, HEADER:] >= 0, lengths, 0).max(axis=1)
    return int((np.minimum(found.pieces[1:, 1], longest) - found.pieces[1:, 0]).sum())


def test_a_shared_prefix_is_read_once_for_the_group():
    prefix, ones = np.arange(256), np.ones(8, dtype=np.int64)
    slots = [np.concatenate([prefix, 1000 * (1 + i) + np.arange(30 + i)]) for i in range(8)]
    keys, table = np.array([len(s) for s in slots]), np.concatenate(slots)
    own = sum(range(30, 38))
    assert keys_read(plan(ones, keys, 3, table)) == 256 + own
    assert keys_read(plan(ones, keys, 3, None)) == 8 * 256 + own
    assert keys_read(plan(ones, keys, 8, table)) == 2 * 256 + own  # a tile holds 4 queries of 8 heads


def test_a_prompt_reads_its_keys_once_for_a_tile():
    found = plan(np.array([10]), np.array([260]), 4, np.arange(260))
    assert found.pieces[1:, :HEADER].tolist() == [[0, 128, 0]] * 2 + [[128, 256, 1]] * 2 + [[256, 384, 2]]
    all_of_them = [[*range(8)], [8, 9, *[-1] * 6]]
    assert found.pieces[1:, HEADER:].tolist() == [*all_of_them, *all_of_them, [6, 7, 8, 9, *[-1] * 4]]
    assert found.queries[:, 0].tolist() == [*range(251, 261)]


@pytest.mark.parametrize(("tokens", "length"), [(2, 300_000), (1000, 2000)])
def test_memory_for_parts_is_bounded(tokens, length):
    """By longer pieces, but no longer than need be, of prompts and of decoding each for themselves."""
    prompt = plan(np.array([tokens, 1]), np.array([length, 200]), 1, None)
    alone = plan(np.ones(tokens, dtype=np.int64), np.full(tokens, length), 1, None)
    for found, counted in ((prompt, prompt.queries[:-1]), (alone, alone.queries)):
        spare = int((counted[:, 3] - 1).sum())
        assert SPARE_PARTS // 2 - tokens < spare <= SPARE_PARTS
        assert (found.pieces[1:, 1] - found.pieces[1:, 0]).max() > 128
    assert prompt.queries[-1, 3] == 2


def test_too_many_heads_for_a_tile_are_refused():
    with pytest.raises(ValueError, match="33 query heads"):
        plan(np.array([1]), np.array([1]), 33, None)


# --- the kernels ------------------------------------------------------------------------------------------------------


def problem(segments, heads, kv_heads, dim, dtype, prefix=0):
    """Arguments of paged_attention for (queries, keys) of each sequence, the first `prefix` keys the same for all.

    Slots that belong to no sequence hold NaN.
    """
    g = torch.Generator().manual_seed(heads + dim)
    count, own = sum(n for n, _ in segments), [keys - prefix for _, keys in segments]
    shared, *rest, _ = torch.randperm(prefix + sum(own) + 9, generator=g).split([prefix, *own, 9])
    slots = torch.cat([torch.cat([shared, mine]) for mine in rest])
    q = torch.randn(count, heads, dim, generator=g)
    k, v = (torch.full((prefix + sum(own) + 9, kv_heads, dim), math.nan) for _ in range(2))
    for cache in (k, v):
        cache[slots] = torch.randn(len(slots), kv_heads, dim, generator=g)
    q, k, v = (x.to(DEVICE, dtype) for x in (q, k, v))
    query_starts, slot_starts = (torch.tensor([0, *np.cumsum(counts)]) for counts in zip(*segments, strict=True))
    return q, k, v, slots.to(DEVICE), slot_starts, query_starts, dim**-0.5


def tables_of(case, share: bool, padding: int = 0) -> Tables:
    """A plan with NaN for what the kernels have to fill, longer than it needs to be."""
    q, k, _, slots, slot_starts, query_starts, _ = case
    found = plan(
        query_starts.diff().numpy(),
        slot_starts.diff().numpy(),
        q.shape[1] // k.shape[1],
        slots.cpu().numpy() if share else None,
    )
    queries, pieces = np.pad(found.queries, ((0, padding), (0, 0))), np.pad(found.pieces, ((0, padding), (0, 0)))
    return Tables(
        slots.int(),
        torch.from_numpy(queries).to(DEVICE),
        torch.from_numpy(pieces).to(DEVICE),
        torch.full((found.parts + padding, *q.shape[1:]), math.nan, device=DEVICE),
        torch.full((found.parts + padding, q.shape[1]), math.nan, device=DEVICE),
    )


def attend(case, share: bool) -> torch.Tensor:
    q, k, v, *_, scale = case
    return triton_attention.attend(q, k, v, tables_of(case, share), scale)


def exact(case) -> torch.Tensor:
    q, k, v, *rest = case
    return paged_attention_reference(q.double(), k.double(), v.double(), *rest)


def relative_error(found, expected) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


DECODING = [(1, 1), (1, 31), (1, 32), (1, 33), (1, 300)]


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim"),
    [
        (torch.float32, 6, 2, 64),
        (torch.float32, 2, 2, 80),
        (torch.float32, 4, 1, 8),
        (torch.bfloat16, 4, 1, 128),
        (torch.bfloat16, 3, 1, 64),
        (torch.float16, 8, 1, 80),
    ],
    ids=str,
)
def test_decoding(dtype, heads, kv_heads, dim):
    case = problem(DECODING, heads, kv_heads, dim, dtype)
    found = attend(case, share=True)
    assert found.dtype == dtype
    assert relative_error(found, exact(case)) < LIMITS[dtype]


@pytest.mark.usefixtures("short_pieces")
def test_decoding_after_a_shared_prefix():
    """More sequences than a tile holds, so that the prefix is read by two programs; a prompt beside them."""
    case = problem([*((1, 70 + 7 * i) for i in range(5)), (5, 81)], 8, 1, 16, torch.float32, prefix=70)
    assert relative_error(attend(case, share=True), exact(case)) < LIMITS[torch.float32]


def test_as_a_backend_of_paged_attention():
    case = problem([(1, 200), (0, 3), (5, 5), (3, 90), (1, 1)], 2, 1, 64, torch.float32)
    assert relative_error(triton_attention.paged_attention(*case), exact(case)) < LIMITS[torch.float32]
    q, k, v, slots, slot_starts, query_starts, scale = case
    nothing = triton_attention.paged_attention(q[:0], k, v, slots, slot_starts, query_starts * 0, scale)
    assert nothing.shape == (0, 2, 64)
    if INTERPRETED:
        with pytest.raises(ValueError, match="backend triton is off: torch"):
            paged_attention(*case, backend="triton")
    else:
        torch.testing.assert_close(paged_attention(*case, backend="triton"), triton_attention.paged_attention(*case))


@pytest.mark.usefixtures("short_pieces")
def test_peaked_scores_of_rising_size():
    """Each further step and piece holds the new maximum, so everything summed before is scaled down again."""
    q, k, v, slots, *rest = problem([(1, 150), (4, 100)], 2, 1, 32, torch.float32)
    k[slots] += 6 * torch.linspace(-1, 1, len(slots), device=DEVICE)[:, None, None] * q.mean((0, 1)).sign()
    case = (6 * q, k, v, slots, *rest)
    assert relative_error(attend(case, share=False), exact(case)) < (2e-6 if INTERPRETED else 5e-5)


@pytest.mark.usefixtures("short_pieces")
def test_strided_queries_and_caches():
    q, k, v, *rest = problem([(1, 40), (1, 20)], 4, 2, 24, torch.float32)
    wide_q, wide_v = (torch.cat([x, *[torch.full_like(x, math.nan)] * 2], 1)[:, : x.shape[1]] for x in (q, v))
    interleaved_k = torch.stack([k, v], 2)[:, :, 0]
    found, expected = attend((wide_q, interleaved_k, wide_v, *rest), False), attend((q, k, v, *rest), False)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("short_pieces")
def test_queries_that_are_not_there():
    case = problem([(1, 40), (2, 20)], 2, 1, 16, torch.float32)
    q, k, v, *_, scale = case
    padded = torch.cat([q, torch.full((3, 2, 16), math.nan, device=DEVICE)])
    found = triton_attention.attend(padded, k, v, tables_of(case, True, padding=3), scale)
    assert torch.equal(found[:3], attend(case, True))
    assert (found[3:] == 0).all()


def test_keys_and_values_go_to_the_last_slot_of_each_query():
    case = problem([(1, 4), (3, 5)], 6, 3, 20, torch.bfloat16)
    _, k_cache, v_cache, slots, *_ = case
    k, v = (torch.randn(7, 3, 20, device=DEVICE).bfloat16() for _ in range(2))
    k = torch.cat([k, k], 1)[:, :3]
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    own = slots[[3, 6, 7, 8]]
    expected_k[own], expected_v[own] = k[:4], v[:4]
    triton_attention.store(k, v, k_cache, v_cache, tables_of(case, True, padding=3))
    torch.testing.assert_close(k_cache, expected_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_cache, expected_v, rtol=0, atol=0, equal_nan=True)


def test_empty_tables_hold_nothing_and_have_room():
    room = triton_attention.empty_tables(4, 900, 6, 2, 16, torch.device(DEVICE))
    most = plan(np.array([1, 2, 1]), np.full(3, 1024 * 128), 3, None)
    assert most.parts == 4096
    assert min(len(room.sums), len(room.logs), len(room.pieces) - 1) >= most.parts
    assert room.pieces.shape[1] == most.pieces.shape[1]
    assert room.queries.shape == most.queries.shape
    q, cache = torch.randn(2, 6, 16, device=DEVICE), torch.full((5, 2, 16), math.nan, device=DEVICE)
    assert (triton_attention.attend(q, cache, cache, room._replace(queries=room.queries[:2]), 1.0) == 0).all()
