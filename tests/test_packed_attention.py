"""Packed attention against a dense mask made from the segments: every kernel, every kind of batch, all gradients.

Our own kernel has no fp64: it is compared with fp64 on the same inputs.

CUDA's flash attention is emulated: its signature and conventions in plain torch, with NaN where it leaves memory as is.
`python -m benchmarks.packed_attention` checks the real one.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.packed_attention import lay_out
from negotiator import packed_attention as module
from negotiator.attention import PackedLayout
from negotiator.packed_attention import (
    CPU,
    FLASH,
    FLASH_RUNS,
    NATIVE,
    PackedAttention,
    choose_kernel,
    looped_attention,
    make_plan,
    packed_attention,
)
from negotiator.recompute import _kept_operators
from negotiator.types import Segment
from negotiator_kernels import packed_attention as native
from negotiator_kernels.availability import native_off_reason

assert native_off_reason() is None  # which also loads it

SCALE = 0.4
BATCHES = {
    "groups": [
        *(Segment(0, 11), Segment(11, 16, 0, 11), Segment(16, 17, 0, 11), Segment(17, 34, 0, 11)),
        *(Segment(34, 35), Segment(35, 39, 34, 35), Segment(39, 48, 34, 35)),
    ],
    "one group": [Segment(0, 5), Segment(5, 9, 0, 5), Segment(9, 10, 0, 5)],
    "no prefix": [Segment(0, 6), Segment(6, 7), Segment(7, 12)],
    "empty prefixes": [Segment(0, 6, 0, 0), Segment(6, 9, 0, 0)],
    "prefixes without a group": [Segment(0, 4), Segment(4, 7), Segment(7, 9, 4, 7), Segment(9, 12), Segment(12, 13)],
    "single tokens": [Segment(0, 1), Segment(1, 2, 0, 1), Segment(2, 3, 0, 1), Segment(3, 4)],
    "a group that waits": [Segment(0, 3), Segment(3, 5), Segment(5, 9, 0, 3), Segment(9, 11, 3, 5)],
    "one token": [Segment(0, 1)],
}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment]) -> Tensor:
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for s in segments:
        seen[s.start : s.end, s.start : s.end] = torch.ones(s.end - s.start, s.end - s.start).tril().bool()
        seen[s.start : s.end, s.prefix_start : s.prefix_end] = True
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (SCALE * torch.einsum("qhd,khd->hqk", q, k)).masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def scores_of(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = scale * torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    rows, columns = scores.shape[1:]
    return (
        scores.masked_fill(torch.ones(rows, columns).triu(columns - rows + 1).bool(), -torch.inf) if causal else scores
    )


def checked_runs(q, k, cu_q, cu_k, max_q, max_k):
    assert q.is_contiguous() and k.is_contiguous() and cu_q.is_contiguous() and cu_k.is_contiguous()
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert max_q == max(2, cu_q.diff().max()) and max_k == cu_k.diff().max()
    return [
        (slice(*rows), slice(*columns))
        for rows, columns in zip(itertools.pairwise(cu_q.tolist()), itertools.pairwise(cu_k.tolist()), strict=True)
    ]


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale):
    assert dropout_p == 0 and not return_debug_mask
    dtype = q.dtype
    q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
    out = torch.full_like(q, torch.nan)
    lse = torch.full((q.shape[1], len(q)), torch.nan, dtype=q.dtype)
    for rows, columns in checked_runs(q, k, cu_q, cu_k, max_q, max_k):
        if columns.start == columns.stop:
            out[rows], lse[:, rows] = 0, torch.inf
        else:
            scores = scores_of(q[rows], k[columns], is_causal, scale)
            lse[:, rows] = scores.logsumexp(-1)
            values = v[columns].repeat_interleave(q.shape[1] // v.shape[1], dim=1)
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out.to(dtype), lse, None, None, None


def flash_backward(
    dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused, *, scale
):
    assert dropout_p == 0 and dout.is_contiguous() and out.is_contiguous() and lse.is_contiguous()
    dtype = q.dtype
    dout, q, k, v, out = (x.to(lse.dtype) for x in (dout, q, k, v, out))
    dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    for rows, columns in checked_runs(q, k, cu_q, cu_k, max_q, max_k):
        p = (scores_of(q[rows], k[columns], is_causal, scale) - lse[:, rows, None]).exp()
        keys, values = (x[columns].repeat_interleave(repeats, dim=1) for x in (k, v))
        dp = torch.einsum("qhd,khd->hqk", dout[rows], values)
        ds = p * (dp - (dout[rows] * out[rows]).sum(-1).t()[..., None]) * scale
        dq[rows] = torch.einsum("hqk,khd->qhd", ds, keys)
        dk[columns] = torch.einsum("hqk,qhd->khd", ds, q[rows]).unflatten(1, (-1, repeats)).sum(2)
        dv[columns] = torch.einsum("hqk,qhd->khd", p, dout[rows]).unflatten(1, (-1, repeats)).sum(2)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


@pytest.fixture
def emulated_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)


def through(kernel, q, k, v, segments):
    return PackedAttention.apply(q, k, v, make_plan(segments), kernel, SCALE)


native_attention = partial(through, NATIVE)
WAYS = {
    "loop": lambda *x: looped_attention(*x, SCALE),
    "cpu": partial(through, CPU),
    "flash": partial(through, FLASH),
}


def draw(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the output's gradient, each a view whose heads lie apart."""
    torch.manual_seed(tokens)
    sizes = [heads, kv_heads, kv_heads, heads]
    return [(2 * torch.randn(h, tokens, dim, dtype=torch.float64)).to(dtype).transpose(0, 1) for h in sizes]


def results(attention, inputs: list[Tensor], segments: list[Segment]) -> list[Tensor]:
    q, k, v = (x.clone().requires_grad_() for x in inputs[:3])
    out = attention(q, k, v, segments)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs[3])]


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_a_dense_mask(emulated_flash, batch, way, heads):
    segments = BATCHES[batch]
    inputs = draw(segments[-1].end, *heads, 16)
    expected = results(dense_attention, inputs, segments)
    for found, right in zip(results(WAYS[way], inputs, segments), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_bf16_is_merged_in_fp32(emulated_flash, way):
    """Each part is rounded to bf16, and their sum: weights of the parts in bf16 would add about as much again."""
    segments = BATCHES["groups"]
    inputs = draw(segments[-1].end, 6, 2, 16, torch.bfloat16)
    expected = results(dense_attention, [x.double() for x in inputs], segments)
    for found, right, limit in zip(
        results(WAYS[way], inputs, segments), expected, (1.9e-3, 0.02, 0.02, 0.02), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert (found.double() - right).norm() / right.norm() < limit


def test_layout_takes_heads_first_and_scores_beyond_the_range_of_exp():
    segments = BATCHES["groups"]
    inputs = [x * s for x, s in zip(draw(segments[-1].end, 6, 2, 16), (30, 30, 1, 1), strict=True)]
    expected = results(dense_attention, inputs, segments)

    def layout(q, k, v, segments):
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return PackedLayout(segments).attend(0, *heads_first, SCALE)[0]

    for found, right in zip(results(layout, inputs, segments), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


class Calls(TorchDispatchMode):
    """How often attention's forward pass is computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.negotiator_kernels.packed_attention.default,
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("dtype", "once"), [(torch.float32, 1), (torch.float64, 9)], ids=["native", "cpu"])
@pytest.mark.parametrize("kept", [False, True], ids=["full", "selective"])
def test_recomputed_in_the_backward_pass(kept, dtype, once):
    segments = BATCHES["groups"]
    inputs = draw(segments[-1].end, 6, 2, 16, dtype)
    plan = make_plan(segments)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _kept_operators())} if kept else {}

    def layer(q, k, v, _):
        return packed_attention(q.sin(), k.sin(), v.sin(), plan, SCALE).sin()

    def recomputed(*x):
        return checkpoint(layer, *x, use_reentrant=False, **contexts)

    with Calls() as calls:
        found = results(recomputed, inputs, segments)
    assert calls.count == once * (1 if kept else 2)
    for got, right in zip(found, results(layer, inputs, segments), strict=True):
        assert torch.equal(got, right)


# --- our own kernel ---------------------------------------------------------------------------------------------------

# Tiles of 96 rows, blocks of 48 keys, chunks of 256 queries: segments within one, at their edges and beyond.
LONG = {
    "several chunks": lay_out([(100, [270, 70, 1, 50]), (1, [5, 33]), (0, [97, 1])]),
    "edges": lay_out([(48, [32, 64, 33]), (0, [257])]),
}


SHAPES = [((6, 2), 16), ((4, 4), 20), ((3, 1), 64), ((100, 1), 7)]


@pytest.mark.parametrize(
    ("batch", "heads", "dim"), [(b, *s) for b in BATCHES for s in SHAPES] + [(b, *s) for b in LONG for s in SHAPES[:3]]
)
def test_native_equals_fp64(batch, heads, dim):
    segments = (BATCHES | LONG)[batch]
    q, *rest = draw(segments[-1].end, *heads, dim, torch.float32)
    inputs = [q * (16 / dim) ** 0.5, *rest]  # scores of one size, and so of one precision, for all dimensions
    wide = [x.double() for x in inputs]
    expected = results(dense_attention, wide, segments)
    for found, right in zip(results(native_attention, inputs, segments), expected, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), right, rtol=0, atol=1e-5 * (1 + right.abs().max().item()))
    table = make_plan(segments).table
    _, lse = native.forward(*(x.contiguous() for x in inputs[:3]), table, SCALE)
    out, right = native.reference(*wide[:3], table, SCALE)
    torch.testing.assert_close(lse.double(), right, rtol=0, atol=2e-5)
    torch.testing.assert_close(out, expected[0], rtol=0, atol=1e-12)


def test_native_with_scores_beyond_the_range_of_exp():
    """Scores of some thousands are off by 1e-3 in fp32, and so are weights."""
    segments = LONG["several chunks"]
    inputs = [x * s for x, s in zip(draw(segments[-1].end, 6, 2, 16, torch.float32), (30, 30, 1, 1), strict=True)]
    expected = results(dense_attention, [x.double() for x in inputs], segments)
    for found, right in zip(results(native_attention, inputs, segments), expected, strict=True):
        assert (found - right).norm() < 2e-3 * right.norm()


def test_native_groups_do_not_reach_each_other():
    segments = LONG["edges"]
    alone = segments[-1].start
    inputs = draw(segments[-1].end, 6, 2, 16, torch.float32)
    right = results(native_attention, inputs, segments)
    for x in inputs:
        x[alone:] = torch.nan
    for found, expected in zip(results(native_attention, inputs, segments), right, strict=True):
        assert torch.equal(found[:alone], expected[:alone]) and found[alone:].isnan().all()


def test_native_results_do_not_depend_on_the_number_of_threads():
    segments = LONG["several chunks"]
    inputs = draw(segments[-1].end, 6, 2, 16, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(native_attention, inputs, segments)
        torch.set_num_threads(3)
        together = results(native_attention, inputs, segments)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_native_refuses_what_does_not_fit():
    q, k, v, dout = (x.contiguous() for x in draw(9, 6, 2, 16, torch.float32))
    table = torch.tensor([[0, 4, 0, 0], [4, 9, 0, 4]])
    out, lse = native.forward(q, k, v, table, SCALE)
    for wrong, message in [
        ((q.double(), k, v, table), "q must be contiguous float32"),
        ((q, k.transpose(0, 1).contiguous().transpose(0, 1), v, table), "k must be contiguous"),
        ((q, k, v[:8], table), "v must be"),
        ((q[:, :5].contiguous(), k, v, table), "multiple"),
        ((q, k, v, table.int()), "segments must be contiguous int64"),
        ((q, k, v, table[:1]), "end with the last token"),
        ((q, k, v, table[1:]), "follow each other"),
        ((q, k, v, torch.tensor([[0, 4, 0, 0], [4, 9, 2, 5]])), "prefix of segment 1 must lie before it"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            native.forward(*wrong, SCALE)
    with pytest.raises(RuntimeError, match="dout must be"):
        native.backward(dout[:8], q, k, v, out, lse, table, SCALE)
    with pytest.raises(RuntimeError, match="lse must be"):
        native.backward(dout, q, k, v, out, lse.t(), table, SCALE)


def test_without_native_code_it_is_torch(monkeypatch):
    monkeypatch.setattr(module, "native_off_reason", lambda: "csrc/ was not built")
    kernel, words = choose_kernel.__wrapped__(torch.device("cpu"), torch.float32, 64)
    assert kernel is CPU and "flash attention for the CPU: csrc/ was not built" in words


def test_the_real_flash_attention_takes_our_arguments():
    """On the meta device: nothing is computed, but every argument is bound and shapes come back."""
    q, k, v, dout = (x.to("meta", torch.bfloat16) for x in draw(48, 6, 2, 16))
    plan = make_plan(BATCHES["groups"]).to(torch.device("meta"))
    for runs in (plan.own, plan.shared):
        out, lse = FLASH_RUNS.forward(q, k, v, runs, SCALE)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (6, 48), torch.float32)
        gradients = FLASH_RUNS.backward(dout, q, k, v, out, lse, runs, SCALE)
        assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("cpu", torch.float32, 100, "our own"),
        ("cpu", torch.float64, 100, "flash attention for the CPU: our own computes in fp32, not in torch.float64"),
        ("cuda", torch.float32, 64, "float32"),
        ("cuda", torch.bfloat16, 100, "100"),
        ("cuda", torch.bfloat16, 256, "256"),
        ("meta", torch.bfloat16, 64, "meta"),
    ],
)
def test_says_which_kernel_and_why(device, dtype, head_dim, reason):
    kernel, words = choose_kernel(torch.device(device), dtype, head_dim)
    expected = None if device != "cpu" else NATIVE if dtype == torch.float32 else CPU
    assert kernel is expected and (kernel is None) == words.startswith("a loop")
    assert reason in words


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(0, 3), Segment(4, 7)],  # a hole
        [Segment(1, 7)],
        [Segment(0, 3), Segment(3, 3)],
        [Segment(0, 3), Segment(3, 7, 0, 2)],  # a prefix that is part of a segment
        [Segment(0, 3, 3, 7), Segment(3, 7)],  # a prefix behind its group
        [Segment(0, 3), Segment(3, 5, 0, 3), Segment(5, 6), Segment(6, 8, 0, 3)],  # a group in two places
    ],
)
def test_bad_segments_are_refused(segments):
    with pytest.raises(AssertionError):
        make_plan(segments)
