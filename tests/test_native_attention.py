"""Paged attention against its reference and against an oracle written out here; keys that several segments share."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from negotiator_kernels import paged_attention

BACKENDS = ["reference", "native"]


def starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths).tolist()])


def attention_case(segments, heads, kv_heads, dim, dtype, sharpness=1.0, seed=0):
    """Arguments of paged_attention for segments of (queries, keys); slots that belong to no segment hold NaN."""
    torch.manual_seed(seed)
    queries, keys = starts([n for n, _ in segments]), starts([length for _, length in segments])
    pool = int(keys[-1]) + 50
    q = (sharpness * torch.randn(int(queries[-1]), heads, dim)).to(dtype)
    slots = torch.randperm(pool)[: int(keys[-1])]
    k, v = (torch.full((pool, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2))
    k[slots], v[slots] = (torch.randn(len(slots), kv_heads, dim).to(dtype) for _ in range(2))
    return q, k, v, slots, keys, queries, dim**-0.5


def attention_oracle(q, k_cache, v_cache, slots, slot_starts, query_starts, scale):
    """One query and one head at a time, in fp64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // k_cache.shape[1]
    for s in range(len(query_starts) - 1):
        own = slots[slot_starts[s] : slot_starts[s + 1]]
        n = int(query_starts[s + 1] - query_starts[s])
        for i in range(n):
            seen = own[: len(own) - n + i + 1]
            for head in range(q.shape[1]):
                row = q[query_starts[s] + i, head].double()
                scores = k_cache[seen, head // group].double() @ row * scale
                out[query_starts[s] + i, head] = scores.softmax(0) @ v_cache[seen, head // group].double()
    return out


def worst_row(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of one query's output: norms over all queries would hide it."""
    got, want = got.double().flatten(1), want.double().flatten(1)
    return ((got - want).norm(dim=1) / want.norm(dim=1)).max().item()


MIXED = [(1, 130), (1, 1), (70, 161), (5, 5), (2, 49), (0, 3), (1, 48), (33, 33)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 40), (8, 1, 128), (2, 1, 7)])
def test_attention_of_decoding_and_prefill_together(backend, dtype, heads, kv_heads, dim):
    case = attention_case(MIXED, heads, kv_heads, dim, dtype)
    # Plain torch has 7e-7 in fp32 and 4.3e-3 in bf16, where rounding the output alone makes it 2.7e-3.
    limit = 1.2e-6 if dtype == torch.float32 else 5e-3
    assert worst_row(paged_attention(*case, backend=backend), attention_oracle(*case)) < limit


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_with_peaked_scores_of_rising_size(backend):
    """Each further block of keys holds the new maximum, so everything summed before is scaled down again."""
    q, k, v, slots, *rest = attention_case([(1, 300), (40, 200)], 6, 2, 32, torch.float32, sharpness=6.0)
    k[slots] += torch.linspace(-1, 1, len(slots))[:, None, None] * q.mean((0, 1)).sign()
    case = (q, k, v, slots, *rest)
    assert worst_row(paged_attention(*case, backend=backend), attention_oracle(*case)) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_reads_strided_queries_and_caches(backend):
    q, k, v, *rest = attention_case([(1, 60), (20, 70)], 6, 2, 24, torch.float32)
    fused = torch.cat([q, torch.full((len(q), 4, 24), math.nan)], 1)[:, :6]
    interleaved = torch.stack([k, v], 1)
    assert not fused.is_contiguous()
    got = paged_attention(fused, interleaved[:, 0], interleaved[:, 1], *rest, backend=backend)
    assert torch.equal(got, paged_attention(q, k, v, *rest, backend=backend))


def test_attention_takes_32_bit_indices():
    q, k, v, slots, keys, queries, scale = attention_case(MIXED, 2, 1, 16, torch.float32)
    want = paged_attention(q, k, v, slots, keys, queries, scale)
    assert torch.equal(paged_attention(q, k, v, slots.int(), keys.int(), queries.int(), scale), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_names_what_does_not_fit(backend):
    q, k, v, slots, keys, queries, scale = attention_case([(1, 6), (2, 4)], 4, 2, 16, torch.float32)
    for wrong, message in [
        ((q[:, :3], k, v, slots, keys, queries), "3 query heads"),
        ((q, k, v.bfloat16(), slots, keys, queries), "one dtype"),
        ((q, k, v[:, :1], slots, keys, queries), "v_cache"),
        ((q, k, v, slots.float(), keys, queries), "slots must be"),
        ((q, k, v, slots, keys[:2], queries), "slot_starts and query_starts"),
    ]:
        with pytest.raises(ValueError, match=message):
            paged_attention(*wrong, scale, backend=backend)
    for slots_, keys_, queries_, message in [
        (slots[:9], keys, queries, "slot_starts must rise from 0 to 9"),
        (slots, keys, torch.tensor([0, 4, 3]), "query_starts must rise from 0 to 3"),
        (slots, torch.tensor([0, 9, 10]), queries, "segment 1 has more queries than keys"),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=message):
            paged_attention(q, k, v, slots_, keys_, queries_, scale, backend=backend)


def test_native_attention_refuses_slots_outside_the_pool_and_no_heads():
    q, k, v, slots, keys, queries, scale = attention_case([(1, 6), (2, 4)], 4, 2, 16, torch.float32)
    with pytest.raises(RuntimeError, match="the heads of q"):
        paged_attention(q[:, :0], k, v, slots, keys, queries, scale, backend="native")
    for outside in (slots - 60, slots + 60):
        with pytest.raises(RuntimeError, match=r"slots must be in \[0, 60\)"):
            paged_attention(q, k, v, outside, keys, queries, scale, backend="native")


# --- keys seen by several segments: the native operator reads them once for all -----------------------------------


Segment = tuple[Sequence[int], int]  # slots of its keys, number of its queries


def shared_case(segments: Sequence[Segment], heads, kv_heads, dim, dtype):
    """Like `attention_case`, for segments whose slots are given."""
    torch.manual_seed(0)
    keys, queries = starts([len(slots) for slots, _ in segments]), starts([n for _, n in segments])
    used = torch.tensor([slot for slots, _ in segments for slot in slots], dtype=torch.int64)
    pool = int(used.max()) + 50
    place = torch.randperm(pool)
    q = torch.randn(int(queries[-1]), heads, dim).to(dtype)
    k, v = (torch.full((pool, kv_heads, dim), math.nan, dtype=dtype) for _ in range(2))
    k[place[used]], v[place[used]] = (torch.randn(len(used), kv_heads, dim).to(dtype) for _ in range(2))
    return q, k, v, place[used], keys, queries, dim**-0.5


def keys_of(text: str) -> list[int]:
    """Slots of "a40 b2": the first 40 of story a, then the first 2 of story b."""
    return [200 * (ord(part[0]) - ord("a")) + i for part in text.split() for i in range(int(part[1:]))]


# Keys of a segment, and how many queries it has. Keys are shared in whole blocks of 48.
SHARED = {
    "a group": [("a100 b1", 1), ("a100 c1", 1), ("a100 d1", 1), ("a100 e1", 1)],
    "a group larger than a tile": [(f"a50 {own}3", 3) for own in "bcdefghijklmnopqrstuvwxyz"],
    "prompts after a common beginning": [("a60 b20", 20), ("a60 c49", 33), ("a60 d1", 1), ("a60 e70", 70)],
    "prompts computed in pieces": [("a70 b30", 17), ("a70 c2", 1), ("a70", 9)],
    "common beginnings of common beginnings": [
        ("a60 b60 c60 e1", 1), ("a60 b60 c60 f40", 1), ("a60 b60 c60 g9", 8), ("a60 b60 d5", 1), ("a60 b60 e70", 3),
        ("a60 c40 d20", 1), ("a60 c40 e20", 2), ("a60 d1", 1), ("a23 b7", 2), ("a1 b60", 1), ("a100", 1),
    ],
    "too short to share": [("a47 b9", 3), ("a47 c5", 1), ("a46 d1", 1)],
    "just long enough": [("a48 b2", 1), ("a48 c3", 3), ("a49 d4", 2), ("a96 e1", 1), ("a96 f1", 1), ("a96 g2", 1)],
    "the same keys": [("a100", 1), ("a100", 1), ("a100", 1)],
    "the same keys, not seen by all queries": [("a100", 1), ("a100", 70), ("a100", 100), ("a61", 61), ("a100", 0)],
    "one is the beginning of another": [("a48", 1), ("a49", 1), ("a50", 1), ("a97", 2), ("a100", 1), ("a1", 1)],
    "nothing in common": [("a50", 2), ("b50", 3), ("c1", 1)],
    "equal only later on": [("b1 a100", 1), ("c1 a100", 2), ("a100", 1)],
}  # fmt: skip


def assert_same_bits_alone(got: torch.Tensor, case) -> None:
    """Each segment by itself, and each of its queries by itself, gives the very bits it gave beside the others."""
    q, k, v, slots, keys, queries, scale = case
    for s in range(len(keys) - 1):
        n, own = int(queries[s + 1] - queries[s]), slots[keys[s] : keys[s + 1]]
        for first, last in [(0, n), *((i, i + 1) for i in range(0, n, 7))]:
            rows = slice(int(queries[s]) + first, int(queries[s]) + last)
            seen = own[: len(own) - n + last]
            alone = paged_attention(
                q[rows], k, v, seen, starts([len(seen)]), starts([last - first]), scale, backend="native"
            )
            assert torch.equal(alone, got[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_attention_over_shared_keys(name, dtype):
    case = shared_case([(keys_of(keys), n) for keys, n in SHARED[name]], 6, 2, 24, dtype)
    got = paged_attention(*case, backend="native")
    assert worst_row(got, attention_oracle(*case)) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert_same_bits_alone(got, case)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 40), (8, 1, 128), (2, 1, 7), (100, 1, 8)])
def test_attention_over_shared_keys_of_any_shape(heads, kv_heads, dim):
    segments = [(keys_of("a100 b3"), 1), (keys_of("a100 c4"), 3), (keys_of("a100 d9"), 5), (keys_of("a100 e40"), 37)]
    case = shared_case(segments, heads, kv_heads, dim, torch.float32)
    assert worst_row(paged_attention(*case, backend="native"), attention_oracle(*case)) < 1e-6


@pytest.mark.parametrize("at", [0, 90])
def test_peaked_attention_over_shared_keys(at):
    """Nearly all of a query's weight lies in the shared keys, or in its own, which then scale down all before."""
    group = [(keys_of(keys), 1) for keys in ("a80 b30", "a80 c30", "a80 d30")]
    q, k, v, slots, *rest = shared_case(group, 4, 2, 16, torch.float32)
    for peaked in (slots[at : at + 5], slots[110 + at : 115 + at]):
        k[peaked] = 40 * q.mean((0, 1)).sign()
    case = (q, k, v, slots, *rest)
    assert worst_row(paged_attention(*case, backend="native"), attention_oracle(*case)) < 1e-5


def test_shared_keys_with_nan_make_all_who_see_them_nan():
    group = [(keys_of("a100 b1"), 1), (keys_of("a100 c1"), 1)]
    q, k, v, slots, keys, queries, scale = shared_case(group, 4, 2, 16, torch.float32)
    k[slots[50], 1, 3] = math.nan
    got = paged_attention(q, k, v, slots, keys, queries, scale, backend="native")
    assert got[:, 2:].isnan().all() and got[:, :2].isfinite().all()


@st.composite
def trees(draw) -> list[Segment]:
    """Each segment goes on from any place in an earlier one; the number of its queries is anything."""
    segments: list[Segment] = []
    for i in range(draw(st.integers(1, 7))):
        before = segments[draw(st.integers(0, i - 1))][0] if i else []
        slots = [*before[: draw(st.integers(0, len(before)))], *range(100 * i, 100 * i + draw(st.integers(0, 99)))]
        segments.append((slots, draw(st.integers(0, len(slots)) | st.just(min(1, len(slots))))))
    return segments


@settings(max_examples=150, deadline=None)
@given(trees(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_attention_over_any_tree_of_segments(segments, dtype):
    if not any(n for _, n in segments):
        return
    case = shared_case(segments, 6, 2, 12, dtype)
    exact = (x.double() if x.is_floating_point() else x for x in case[:-1])
    want = paged_attention(*exact, case[-1], backend="reference")
    got = paged_attention(*case, backend="native")
    assert worst_row(got, want) < (1e-6 if dtype == torch.float32 else 3e-3)
    assert_same_bits_alone(got, case)
