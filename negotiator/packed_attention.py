"""Attention of a packed batch, exact: every token sees its segment up to itself, and its segment's prefix.

    T  packed tokens    Hq query heads    Hkv key/value heads (Hq is a multiple)    D head dimension
    q, out, dout, dq [T, Hq, D]    k, v, dk, dv [T, Hkv, D]    lse [Hq, T], the log-sum-exp of each query's scores

In fp32 on a CPU it is one call of our own kernel. Elsewhere it is made of two parts that are merged: one call over all
segments, causal, and one over all groups, in which the tokens after a prefix are one long query sequence, so that the
prefix is read once for all of them. Each part is a call of torch's flash attention over runs of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from negotiator.types import Segment
from negotiator_kernels import packed_attention as native
from negotiator_kernels.availability import native_off_reason


class Runs(NamedTuple):
    """Queries starts[i] to starts[i + 1] see, causally or all of them, the keys of run i. Either may be none."""

    query_starts: tuple[int, ...]  # from 0 to T
    key_starts: tuple[int, ...]
    causal: bool
    query_offsets: Tensor  # the same as int32 on the device
    key_offsets: Tensor
    longest_query: int
    longest_key: int

    def to(self, device: torch.device) -> Runs:
        return self._replace(query_offsets=self.query_offsets.to(device), key_offsets=self.key_offsets.to(device))


class Plan(NamedTuple):
    """Who sees whom in a packed batch."""

    segments: tuple[Segment, ...]
    table: Tensor  # of the segments: [S, 4] int64, on the CPU wherever the rest is
    own: Runs
    shared: Runs | None  # None if no segment has a prefix

    @property
    def device(self) -> torch.device:
        return self.own.query_offsets.device

    def to(self, device: torch.device) -> Plan:
        return self._replace(own=self.own.to(device), shared=self.shared.to(device) if self.shared else None)


class Kernel(NamedTuple):
    """Attention of a plan. All tensors are contiguous.

    `forward`: q, k, v, plan, scale -> out, lse. `backward`: dout, q, k, v, out, lse, plan, scale -> dq, dk, dv.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Plan, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Plan, float], tuple[Tensor, Tensor, Tensor]]


class RunsKernel(NamedTuple):
    """The same over runs. A query without keys gets out 0 and lse -inf; whatever has no partner gets gradient 0."""

    forward: Callable[[Tensor, Tensor, Tensor, Runs, float], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Runs, float], tuple[Tensor, Tensor, Tensor]]


def make_plan(segments: Sequence[Segment]) -> Plan:
    """The segments must tile the batch, each group's after its prefix and side by side (`packing.pack` sees to it)."""
    ends = [0, *(s.end for s in segments)]
    assert [s.start for s in segments] == ends[:-1], "a segment does not start where the one before it ends"
    assert all(s.start < s.end for s in segments), "a segment is empty"
    known = {(s.start, s.end) for s in segments}

    # Runs tile both sides, so tokens that take no part as a query are a run without keys, and the other way round:
    # then every part reads and writes the batch where it lies, and nothing is gathered or scattered.
    queries, keys = [0], [0]
    for (start, end), members in itertools.groupby(segments, key=lambda s: (s.prefix_start, s.prefix_end)):
        group = list(members)
        if start == end:
            continue
        first, last = group[0].start, group[-1].end
        assert (start, end) in known, f"the prefix of {group[0]} is no segment"
        assert keys[-1] <= start and end <= first, f"the group of {group[0]} is not side by side behind its prefix"
        queries += [first, first, last]
        keys += [keys[-1], start, end]
    queries += [ends[-1], ends[-1]]
    keys += [keys[-1], ends[-1]]
    shared = _runs(queries, keys, causal=False) if len(keys) > 3 else None
    table = torch.tensor([(s.start, s.end, s.prefix_start, s.prefix_end) for s in segments])
    return Plan(tuple(segments), table, _runs(ends, ends, causal=True), shared)


def _runs(queries: list[int], keys: list[int], causal: bool) -> Runs:
    offsets = torch.tensor([queries, keys], dtype=torch.int32)
    longest_query, longest_key = (max(b - a for a, b in itertools.pairwise(starts)) for starts in (queries, keys))
    return Runs(tuple(queries), tuple(keys), causal, offsets[0], offsets[1], longest_query, longest_key)


def packed_attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
    """What each token of the plan sees, attended to: out; differentiable once."""
    kernel, _ = choose_kernel(q.device, q.dtype, q.shape[-1])
    if kernel is None:
        return looped_attention(q, k, v, plan.segments, scale)
    out: Tensor = PackedAttention.apply(q, k, v, plan, kernel, scale)  # type: ignore[no-untyped-call]  # torch types no `apply`
    return out


@cache
def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Kernel | None, str]:
    """The kernel (None: `looped_attention`) and, in a few words, which and why."""
    if device.type == "cpu":
        reason = native_off_reason() if dtype == torch.float32 else f"our own computes in fp32, not in {dtype}"
        return (NATIVE, "our own") if reason is None else (CPU, f"torch's flash attention for the CPU: {reason}")
    if device.type != "cuda":
        return None, f"a loop over segments: no kernel for {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return None, f"a loop over segments: flash attention computes in bf16 and fp16, not in {dtype}"
    if head_dim % 8 or head_dim > 192:
        return None, f"a loop over segments: flash attention has no kernel for heads of {head_dim} dimensions"
    if not torch.backends.cuda.is_flash_attention_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return None, "a loop over segments: flash attention is not in this torch or not for this GPU"
    return FLASH, "torch's flash attention"


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, kernel: Kernel, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = kernel.forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.kernel, ctx.scale = plan, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.kernel.backward(dout.contiguous(), *ctx.saved_tensors, ctx.plan, ctx.scale)
        return *gradients, None, None, None


def merged(kernel: RunsKernel) -> Kernel:
    """A plan's two parts."""
    return Kernel(partial(_merged_forward, kernel), partial(_merged_backward, kernel))


def _merged_forward(
    kernel: RunsKernel, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = kernel.forward(q, k, v, plan.own, scale)
    return (out, lse) if plan.shared is None else _merge(out, lse, *kernel.forward(q, k, v, plan.shared, scale))


def _merged_backward(
    kernel: RunsKernel,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    # A score's gradient is p (dout . v - dout . out) with p = exp(score - lse): of the other scores of its row it
    # needs out and lse alone. Given those of the whole row, each part's backward is the whole one's share.
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, plan.own, scale)
    if plan.shared is not None:
        parts = kernel.backward(dout, q, k, v, out, lse, plan.shared, scale)
        dq, dk, dv = dq.add_(parts[0]), dk.add_(parts[1]), dv.add_(parts[2])
    return dq, dk, dv


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Into new tensors: selective checkpointing keeps what the kernels returned and refuses to see it changed."""
    share = torch.sigmoid(more_lse - lse).t()[:, :, None]  # [T, Hq, 1] in fp32, like the sums below
    merged = torch.empty_like(out)
    torch.addcmul(out * (1 - share), more, share, out=merged)
    return merged, torch.logaddexp(lse, more_lse)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q,
        k,
        v,
        runs.query_offsets,
        runs.key_offsets,
        max(2, runs.longest_query),  # at 1 it takes every run for one query
        runs.longest_key,
        0.0,  # dropout
        runs.causal,
        False,  # return_debug_mask
        scale=scale,
    )
    assert lse.shape == (q.shape[1], q.shape[0]), f"flash attention returned lse of shape {tuple(lse.shape)}"
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)  # it says +inf where there are no keys


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Runs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    unused = torch.empty(0, dtype=torch.uint64, device=q.device)  # where random numbers would be, for dropout
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        runs.query_offsets,
        runs.key_offsets,
        max(2, runs.longest_query),
        runs.longest_key,
        0.0,
        runs.causal,
        unused,
        unused,
        scale=scale,
    )
    return dq, dk, dv


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, runs: Runs, scale: float) -> tuple[Tensor, Tensor]:
    heads = k.shape[1]
    out = torch.empty_like(q)
    lse = q.new_empty((heads, q.shape[1] // heads, q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32))
    for rows, columns in _slices(runs):
        if columns.start == columns.stop:
            out[rows], lse[:, :, rows] = 0, -torch.inf
        elif rows.start < rows.stop:
            part, lse[:, :, rows] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _by_head(q[rows], heads), *_repeated(q, k[columns], v[columns]), 0.0, runs.causal, scale=scale
            )
            _by_head(out[rows], heads).copy_(part)
    return out, lse.flatten(0, 1)


def _cpu_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, runs: Runs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    heads = k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for rows, columns in _slices(runs):
        if rows.start == rows.stop or columns.start == columns.stop:
            dq[rows], dk[columns], dv[columns] = 0, 0, 0
            continue
        part_dq, part_dk, part_dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _by_head(dout[rows], heads),
            _by_head(q[rows], heads),
            *_repeated(q, k[columns], v[columns]),
            _by_head(out[rows], heads),
            lse.unflatten(0, (heads, -1))[:, :, rows],
            0.0,
            runs.causal,
            scale=scale,
        )
        _by_head(dq[rows], heads).copy_(part_dq)
        dk[columns], dv[columns] = (x.sum(1).transpose(0, 1) for x in (part_dk, part_dv))
    return dq, dk, dv


def _slices(runs: Runs) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each run."""
    for rows, columns in zip(itertools.pairwise(runs.query_starts), itertools.pairwise(runs.key_starts), strict=True):
        yield slice(*rows), slice(*columns)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """View of [n, Hq, D] as [Hkv, Hq / Hkv, n, D]: query heads that share keys side by side."""
    grouped: Tensor = x.unflatten(1, (heads, -1))
    return grouped.permute(1, 2, 0, 3)


def _repeated(q: Tensor, *keys: Tensor) -> list[Tensor]:
    """Views of each [n, Hkv, D] as [Hkv, Hq / Hkv, n, D]."""
    return [_by_head(x, x.shape[1]).expand(-1, q.shape[1] // x.shape[1], -1, -1) for x in keys]


def looped_attention(q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segment], scale: float) -> Tensor:
    """The same in any precision and on any device, segment by segment, each with a copy of its prefix before it."""
    repeats = q.shape[1] // k.shape[1]
    sizes = [s.end - s.start for s in segments]
    places = {(s.start, s.end): i for i, s in enumerate(segments)}
    # Split, not sliced: the backward of a slice fills a tensor of all T tokens, once per segment.
    queries = torch.split(q.transpose(0, 1)[None], sizes, dim=2)
    keys, values = (
        torch.split(x.transpose(0, 1)[None].repeat_interleave(repeats, dim=1), sizes, dim=2) for x in (k, v)
    )
    outputs = []
    for segment, query, key, value in zip(segments, queries, keys, values, strict=True):
        mask = None
        if segment.prefix_end > segment.prefix_start:
            prefix = places[segment.prefix_start, segment.prefix_end]
            key = torch.cat((keys[prefix], key), dim=2)
            value = torch.cat((values[prefix], value), dim=2)
            rows, columns = query.shape[2], key.shape[2]
            mask = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(columns - rows)
        outputs.append(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)
        )
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def _native_forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> tuple[Tensor, Tensor]:
    return native.forward(q, k, v, plan.table, scale)


def _native_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return native.backward(dout, q, k, v, out, lse, plan.table, scale)


NATIVE = Kernel(_native_forward, _native_backward)
FLASH_RUNS = RunsKernel(_flash_forward, _flash_backward)
FLASH = merged(FLASH_RUNS)
CPU = merged(RunsKernel(_cpu_forward, _cpu_backward))
