"""The learner's attention: exact? and how fast, forward and backward?

    python -m benchmarks.packed_attention

On a GPU it is checked in bf16 and fp16 and timed beside a loop and FlexAttention; without one, our own kernel for the
CPU is, in fp32, beside torch's, by turns. Checked are outputs and gradients, relative to the norm, against the loop in
fp64 on the same inputs, and on a GPU the log-sum-exps. Takes about a minute; exits with 1 when something is not exact.

Shapes: T packed tokens, Hq query heads, Hkv key/value heads, D head dimension.
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from negotiator.packed_attention import (
    CPU,
    FLASH,
    FLASH_RUNS,
    NATIVE,
    Kernel,
    PackedAttention,
    Plan,
    choose_kernel,
    looped_attention,
    make_plan,
    packed_attention,
)
from negotiator.types import Segment

HOST = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SECONDS = 55.0
FLEX_SECONDS = 15.0  # what is left at least for FlexAttention to compile in, else it is not tried
# Outputs are rounded to bf16 twice (each part, then their sum), and probabilities before they multiply values.
OUT_LIMIT, GRADIENT_LIMIT, LSE_LIMIT = 6e-3, 1.5e-2, 1e-4
CPU_LIMIT = 1e-6
ROUNDS = 7


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int


QWEN3_4B = Shape(32, 8, 128)
SHAPES = [QWEN3_4B, Shape(9, 3, 64), Shape(16, 16, 128), Shape(8, 2, 80), Shape(8, 1, 96), Shape(4, 2, 16)]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def lay_out(groups: list[tuple[int, list[int]]]) -> list[Segment]:
    """Groups of (prefix, the lengths of what follows it), side by side; a prefix of 0 is none."""
    segments: list[Segment] = []
    end = 0
    for prefix, lengths in groups:
        start, shared_end = end, end + prefix
        if prefix:
            segments.append(Segment(start, shared_end))
        end = shared_end
        for length in lengths:
            segments.append(Segment(end, end + length, start, shared_end))
            end += length
    return segments


LAYOUTS = {
    "several groups": lay_out([(300, [70, 1, 129, 128]), (1, [5, 64]), (0, [200, 33]), (513, [255, 2])]),
    "one group": lay_out([(256, [150] * 8)]),
    "no prefix": lay_out([(0, [129, 1, 64])]),
    "prefixes without a group": lay_out([(130, []), (40, [77]), (200, [])]),
    "single tokens": lay_out([(1, [1, 1]), (0, [1])]),
    "a group that waits": [Segment(0, 90), Segment(90, 150), Segment(150, 300, 0, 90), Segment(300, 420, 90, 150)],
}


def step_layout(tokens: int) -> list[Segment]:
    """Groups of a prefix of 512 and 24 samples of about 250, the last cut off at `tokens`."""
    draw = random.Random(0)
    groups: list[tuple[int, list[int]]] = []
    left = tokens
    while left > 512:
        lengths: list[int] = []
        left -= 512
        while left and len(lengths) < 24:
            lengths.append(min(left, draw.randint(150, 350)))
            left -= lengths[-1]
        groups.append((512, lengths))
    return lay_out(groups)


def draw(tokens: int, shape: Shape, dtype: torch.dtype, device: torch.device = CUDA) -> list[Tensor]:
    torch.manual_seed(0)
    sizes = [shape.heads, shape.kv_heads, shape.kv_heads, shape.heads]
    q, k, v, dout = (torch.randn(tokens, heads, shape.dim, device=device) for heads in sizes)
    return [x.to(dtype) for x in (2 * q, k, v, dout)]  # scores of standard deviation 2


def results(attention: Attention, inputs: list[Tensor]) -> dict[str, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    out = attention(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), inputs[3])
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}


def errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((found[n].double() - right[n]).norm() / right[n].norm()).item() for n in right}


def lse_error(plan: Plan, inputs: list[Tensor], scale: float) -> float:
    """Largest difference over queries that see keys; infinite where the kernel disagrees about who does."""
    q, k, v, _ = inputs
    worst = 0.0
    keys = k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    for runs in (plan.own, plan.shared) if plan.shared else (plan.own,):
        _, lse = FLASH_RUNS.forward(q, k, v, runs, scale)
        right = torch.full_like(lse, -torch.inf, dtype=torch.float64)
        for i in range(len(runs.key_starts) - 1):
            rows, columns = (slice(*starts[i : i + 2]) for starts in (runs.query_starts, runs.key_starts))
            scores = scale * torch.einsum("qhd,khd->hqk", q[rows].double(), keys[columns])
            if runs.causal:
                scores += torch.full_like(scores, -torch.inf).triu(1)
            right[:, rows] = scores.logsumexp(-1)
        difference = torch.where(lse == right, 0.0, (lse - right).abs())  # equal infinities differ by NaN
        worst = max(worst, difference.nan_to_num(torch.inf).max().item())
    return worst


def check(name: str, segments: list[Segment], shape: Shape, dtype: torch.dtype) -> bool:
    """Prints one line; are all errors within their limits?"""
    scale = shape.dim**-0.5
    plan = make_plan(segments).to(CUDA)
    inputs = draw(segments[-1].end, shape, dtype)
    exact = results(lambda *x: looped_attention(*x, segments, scale), [x.double() for x in inputs])
    freed = torch.full((1 << 26,), torch.nan, device=CUDA)  # 256 MiB, out of which the next tensors are made:
    del freed  # what a kernel should have written and did not is seen
    ours = errors(results(lambda *x: packed_attention(*x, plan, scale), inputs), exact)
    loop = errors(results(lambda *x: looped_attention(*x, segments, scale), inputs), exact)
    ours["lse"] = lse_error(plan, inputs, scale)
    limits = {"out": OUT_LIMIT, "lse": LSE_LIMIT}
    good = all(error <= limits.get(n, GRADIENT_LIMIT) for n, error in ours.items())  # not so if NaN
    listed = "  ".join(f"{n} {error:.1e}" for n, error in ours.items())
    of_loop = "  ".join(f"{n} {error:.1e}" for n, error in loop.items())
    heads = f"{shape.heads}/{shape.kv_heads} heads of {shape.dim}"
    print(f"{'ok   ' if good else 'WRONG'} {name:<25} {heads:<21} {str(dtype)[6:]:<9} {listed}  (loop: {of_loop})")
    return good


def attended_pairs(segments: list[Segment]) -> int:
    lengths = [(s.end - s.start, s.prefix_end - s.prefix_start) for s in segments]
    return sum(own * (own + 1) // 2 + own * prefix for own, prefix in lengths)


def flex(segments: list[Segment], tokens: int, scale: float) -> Attention:
    rows: list[
        tuple[int, int, int]
    ] = []  # of each token: where its segment and its prefix start, where the latter ends
    for s in segments:
        rows += [(s.start, s.prefix_start, s.prefix_end)] * (s.end - s.start)
    own, prefix_start, prefix_end = torch.tensor(rows, device=CUDA).T.contiguous()

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((k >= own[q]) & (k <= q)) | ((k >= prefix_start[q]) & (k < prefix_end[q]))

    mask = create_block_mask(seen, None, None, tokens, tokens, device="cuda")
    compiled: Any = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = compiled(q, k, v, block_mask=mask, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    return attend


class Times(NamedTuple):
    forward_ms: float
    both_ms: float
    launch_ms: float  # until the host is done with forward and backward and could go on to the next layer


def measure(attention: Attention, inputs: list[Tensor]) -> Times:
    """Medians."""
    results(attention, inputs)
    samples = []
    for _ in range(ROUNDS):
        q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        torch.cuda.synchronize()
        started = time.perf_counter()
        events[0].record()
        out = attention(q, k, v)
        events[1].record()
        torch.autograd.grad(out, (q, k, v), inputs[3])
        events[2].record()
        launched = (time.perf_counter() - started) * 1e3
        torch.cuda.synchronize()
        samples.append((events[0].elapsed_time(events[1]), events[0].elapsed_time(events[2]), launched))
    return Times(*(statistics.median(column) for column in zip(*samples, strict=True)))


def compare(deadline: float) -> None:
    """Qwen3-4B's heads over 16,384 tokens, as one layer of a learner's step sees them."""
    shape, dtype = QWEN3_4B, torch.bfloat16
    segments = step_layout(16_384)
    tokens, scale = segments[-1].end, shape.dim**-0.5
    plan = make_plan(segments).to(CUDA)
    inputs = draw(tokens, shape, dtype)
    flops = 4 * attended_pairs(segments) * shape.heads * shape.dim  # of the forward pass; the backward has 2.5 times
    print(f"\n{tokens} tokens in {len(segments)} segments, {shape}, bf16, {flops / 1e9:.0f} GFLOP forward")

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, plan, scale)

    def report(name: str, attention: Attention) -> None:
        forward, both, launch = measure(attention, inputs)
        rates = f"{flops / forward / 1e9:.0f} and {3.5 * flops / both / 1e9:.0f} TFLOP/s"
        line = (
            f"{name:<16} forward {forward:7.2f} ms, with backward {both:7.2f} ms ({rates}), launched in {launch:.2f} ms"
        )
        print(line, flush=True)

    report("ours", ours)
    report("loop", lambda *x: looped_attention(*x, segments, scale))
    left = deadline - time.monotonic()
    if left < FLEX_SECONDS:
        print(f"FlexAttention: not tried, {left:.0f} s were left")
        return
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(int(left))
    try:
        attention = flex(segments, tokens, scale)
        report("FlexAttention", attention)
        signal.alarm(0)
        off = errors(results(attention, inputs), results(ours, inputs))
        print("FlexAttention from ours: " + "  ".join(f"{n} {error:.1e}" for n, error in off.items()))
    except Exception as error:  # whatever its compiler raises, also when cut short: the rest is measured already
        print(f"FlexAttention: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
    finally:
        signal.alarm(0)


SMOLLM2 = SHAPES[1]
CPU_LAYOUTS = {
    "8 samples of 71 after a prefix of 182": lay_out([(182, [71] * 8)]),
    "2 groups of 24 samples after a prefix of 256": lay_out(
        [(256, [71] * 4 + [191] * 20), (256, [71] * 4 + [191] * 20)]
    ),
    "one sample of 4096": lay_out([(0, [4096])]),
}


def compare_on_cpu(name: str, segments: list[Segment], rounds: int) -> bool:
    """Prints errors and medians of both kernels; are ours within the limit?"""
    scale = SMOLLM2.dim**-0.5
    plan = make_plan(segments)
    inputs = draw(segments[-1].end, SMOLLM2, torch.float32, HOST)
    exact = results(lambda *x: looped_attention(*x, segments, scale), [x.double() for x in inputs])
    kernels = {"ours": NATIVE, "torch": CPU}
    seconds: dict[str, list[tuple[float, float]]] = {n: [] for n in kernels}
    for _ in range(rounds):
        for n, kernel in kernels.items():
            seconds[n].append(clock(kernel, inputs, plan, scale))
    flops = 4 * attended_pairs(segments) * SMOLLM2.heads * SMOLLM2.dim
    print(f"\n{name}: {segments[-1].end} tokens, {flops / 1e9:.2f} GFLOP forward")
    good = True
    for n, kernel in kernels.items():

        def attend(*x: Tensor, kernel: Kernel = kernel) -> Tensor:
            return PackedAttention.apply(*x, plan, kernel, scale)

        off = errors(results(attend, inputs), exact)
        good = good and (n != "ours" or all(error <= CPU_LIMIT for error in off.values()))
        forward, backward = (statistics.median(column) for column in zip(*seconds[n], strict=True))
        rates = f"{flops / forward / 1e9:.0f} and {2.5 * flops / backward / 1e9:.0f} GFLOP/s"
        listed = "  ".join(f"{part} {error:.1e}" for part, error in off.items())
        print(
            f"{n:<6} forward {1e3 * forward:7.1f} ms, backward {1e3 * backward:7.1f} ms ({rates})  {listed}", flush=True
        )
    return good


def clock(kernel: Kernel, inputs: list[Tensor], plan: Plan, scale: float) -> tuple[float, float]:
    """Seconds of the forward and the backward pass."""
    q, k, v, dout = inputs
    started = time.perf_counter()
    out, lse = kernel.forward(q, k, v, plan, scale)
    between = time.perf_counter()
    kernel.backward(dout, q, k, v, out, lse, plan, scale)
    return between - started, time.perf_counter() - between


def main_on_cpu() -> None:
    kernel, words = choose_kernel(HOST, torch.float32, SMOLLM2.dim)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}: {words}; {SMOLLM2}, fp32")
    if kernel is not NATIVE:
        sys.exit(1)
    good = [
        compare_on_cpu(name, segments, rounds)
        for (name, segments), rounds in zip(CPU_LAYOUTS.items(), (25, 5, 3), strict=True)
    ]
    if not all(good):
        sys.exit(1)


def _out_of_time(*_: object) -> None:
    raise TimeoutError("did not compile in the time that was left")


def main() -> None:
    if not torch.cuda.is_available():
        return main_on_cpu()
    deadline = time.monotonic() + SECONDS
    kernel, words = choose_kernel(CUDA, torch.bfloat16, QWEN3_4B.dim)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: {words}")
    if kernel is not FLASH:
        sys.exit(1)
    good = [check(name, segments, SHAPES[1], torch.bfloat16) for name, segments in LAYOUTS.items()]
    good += [check("several groups", LAYOUTS["several groups"], shape, torch.bfloat16) for shape in SHAPES]
    good += [check("several groups", LAYOUTS["several groups"], QWEN3_4B, torch.float16)]
    good += [check("a step", step_layout(4096), QWEN3_4B, torch.bfloat16)]
    compare(deadline)
    if not all(good):
        sys.exit(1)


if __name__ == "__main__":
    main()
