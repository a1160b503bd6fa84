"""All providers on one shape: who runs, how often, and a row of results for each."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from statistics import median
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import Fit, Sample, TensorPeak, pick, rotated, sample
from benchmarks.problem import Answer, Errors, Problem, Shape, errors, make_problems
from benchmarks.providers import NATIVE_CE, Provider, bare_gemms, cpu_multiplies_bf16
from negotiator.loss import auto_backend

Status = Literal["measured", "estimated", "off", "oom", "failed"]

MOST_ROUNDS = 5
WARM_UP_TOKENS = 2  # torch.compile makes 1 a special case
TRIAL_PARTS = (1024, 256, 64, 16)  # of the tokens
CLOSE = 1.5  # times the quickest of its kind: who is slower than that is not tried on more tokens
FULL_LOGITS = "plain"  # what peak memory is compared with


@dataclass(frozen=True, slots=True)
class Row:
    """One provider on one shape. Numbers are None where there is none, and the detail says why."""

    provider: str
    kind: str
    tokens: int
    hidden: int
    vocabulary: int
    fraction: float
    status: Status
    detail: str = ""
    rounds: int = 0
    ms: float | None = None  # median
    peak_bytes: int | None = None  # beyond what was held before the call
    tflops: float | None = None  # 6DV a trained row over the time, whatever was really computed
    roofline_fraction: float | None = None  # time of the bare matrix products over trained rows over the time
    logprob_max_abs_error: float | None = None
    grad_rel_error: float | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.tokens, self.hidden, self.vocabulary, self.fraction)


@dataclass(slots=True)
class _Contender:
    name: str
    kind: str
    prepare: Callable[[Problem], Callable[[], Answer | None]]
    fit: Fit = field(default_factory=lambda: Fit([], []))
    samples: list[Sample] = field(default_factory=list)  # of the whole shape
    errors: Errors | None = None  # at the largest number of tokens that it ran on
    failure: tuple[Status, str] | None = None

    @property
    def rank(self) -> str:
        """Who it is up against."""
        return "rival" if self.kind == "compacted" else self.kind

    def ms(self, tokens: int) -> float:
        return median(s.ms for s in self.samples) if self.samples else self.fit.at(tokens)

    def attempt(self, problem: Problem, call: Callable[[], Answer | None]) -> Sample | None:
        """None and `failure` if the provider fails: one that breaks on a machine must not end everybody's run."""
        device = problem.hidden.device
        try:
            result, answer = sample(call, device)
            if answer is not None:
                self.errors = errors(answer, problem, self.kind == "cross-entropy")
            return result
        except torch.OutOfMemoryError:
            self.failure = "oom", "out of memory"
        except Exception as error:
            self.failure = "failed", f"{type(error).__name__}: {error}".partition("\n")[0]
        gc.collect()  # the traceback's frames hold tensors
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def measure_shape(
    shape: Shape, providers: Sequence[Provider], dtype: torch.dtype, device: torch.device, budget_s: float
) -> list[Row]:
    """Everybody once, then by turns while `budget_s` lasts.

    A CPU that only emulates bf16 may take minutes for one call of some. There everybody is tried on few tokens, and
    beyond our default, the bare matrix products and PyTorch's cross-entropy only what fits the budget is run on
    all of them.
    """
    start = time.monotonic()
    contenders = _contenders(providers, dtype, device)
    emulated = device.type == "cpu" and dtype == torch.bfloat16 and not cpu_multiplies_bf16()
    few = sorted({max(WARM_UP_TOKENS, shape.tokens // part) for part in TRIAL_PARTS}) if emulated else []
    warm_up, *trials, problem = make_problems(shape, [WARM_UP_TOKENS, *few, shape.tokens], dtype, device)
    if device.type == "cuda":  # kernels are chosen by the size of the problem
        warm_up = problem
    for c in contenders:
        c.attempt(warm_up, c.prepare(warm_up))

    trying = contenders
    for trial in trials:
        quickest: dict[str, float] = {}
        for c in trying:
            if c.failure is None and (result := c.attempt(trial, c.prepare(trial))):
                c.fit.add(trial.shape.tokens, result.ms)
                quickest[c.rank] = min(result.ms, quickest.get(c.rank, result.ms))
        close = [c for c in trying if c.failure is None and c.fit.ms[-1] <= CLOSE * quickest[c.rank]]
        trying = trying if trial is trials[0] else close  # two trials at least, which tell a fixed cost from the rest
    calls = {c.name: c.prepare(problem) for c in contenders}
    for number in range(MOST_ROUNDS):
        live = {c.name: c for c in contenders if c.failure is None}
        names = list(live)
        if number > 0 or emulated:
            cost = {name: c.ms(shape.tokens) for name, c in live.items()}
            by_cost = sorted(cost, key=cost.__getitem__)
            ours = [name for name in by_cost if live[name].kind == "ours"]
            compared = [name for name in ours if name == auto_backend(device, dtype)] or ours[:1]
            compared += [name for name in by_cost if live[name].kind == "gemms"][:1]
            compared += [name for name in by_cost if name.startswith(NATIVE_CE)][:1]
            left = (budget_s - (time.monotonic() - start)) * 1e3
            left = max(left, sum(cost[name] for name in compared)) if number == 0 else left
            names = pick(cost, compared, left)
        for name in rotated(names, number):
            if result := live[name].attempt(problem, calls[name]):
                live[name].samples.append(result)

    off = {p: reason for p in providers if (reason := p.off_reason(device)) is not None}
    return _rows(contenders, problem) + [Row(p.name, p.kind, *shape, "off", reason) for p, reason in off.items()]


def _contenders(providers: Sequence[Provider], dtype: torch.dtype, device: torch.device) -> list[_Contender]:
    """The providers that are on and the bare matrix products, which a CPU may do faster in fp32 than in bf16."""
    on = [p for p in providers if p.off_reason(device) is None]
    contenders = [_Contender(p.name, p.kind, functools.partial(functools.partial, p.run)) for p in on]
    for t in dict.fromkeys([dtype, torch.float32] if device.type == "cpu" else [dtype]):
        name = f"gemms-{str(t).removeprefix('torch.')}"
        contenders.append(_Contender(name, "gemms", functools.partial(bare_gemms, dtype=t)))
    return contenders


def _counted_peak(contender: _Contender, problem: Problem) -> int:
    """Bytes of tensors at their most in a call that computes nothing, its tensors having shapes only."""
    mode = FakeTensorMode()
    values: dict[str, Any] = {f.name: getattr(problem, f.name) for f in fields(problem)}
    fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in values.items()}
    call = contender.prepare(Problem(**fake))
    with mode, TensorPeak() as count:
        call()
    return count.peak


def _rows(contenders: Sequence[_Contender], problem: Problem) -> list[Row]:
    shape = problem.shape
    live = [c for c in contenders if c.failure is None]
    ms = {c.name: c.ms(shape.tokens) for c in live}
    floor = min((ms[c.name] for c in live if c.kind == "gemms"), default=None)
    rows = [Row(c.name, c.kind, *shape, *c.failure) for c in contenders if c.failure is not None]
    for c in live:
        detail, peak = "", max((s.peak_bytes for s in c.samples if s.peak_bytes is not None), default=None)
        if not c.samples:
            detail = f"from {' and '.join(map(str, c.fit.tokens[-2:]))} tokens"
            if c.name == FULL_LOGITS:
                detail, peak = f"{detail}; memory counted, not measured", _counted_peak(c, problem)
        rows.append(
            Row(
                c.name,
                c.kind,
                *shape,
                status="measured" if c.samples else "estimated",
                detail=detail,
                rounds=len(c.samples),
                ms=ms[c.name],
                peak_bytes=peak,
                tflops=shape.flop / ms[c.name] / 1e9,
                roofline_fraction=None if floor is None else floor / ms[c.name],
                logprob_max_abs_error=None if c.errors is None else c.errors.logprob_max_abs,
                grad_rel_error=None if c.errors is None else c.errors.grad_rel,
            )
        )
    return rows
