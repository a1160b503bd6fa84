"""What the learner benchmark tells: a row for each contender and shape, the table, the figures of a shape."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.learner_contenders import Played
from benchmarks.learner_steps import StepPlayed
from benchmarks.learner_workload import Shape, Workload
from benchmarks.measure import sample
from benchmarks.processes import Failed
from negotiator.config import OptimizerConfig
from negotiator.flops import Model, Work

STATED_PEAKS = {"H200": 989e12, "H100 80GB HBM3": 989e12}  # FLOP/s of dense bf16 products, by a part of the GPU's name
SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product is timed
RATE_SECONDS = 1.0


class Rates(NamedTuple):
    """FLOP/s of matrix products: of this machine at its best, and what its maker states."""

    measured: float
    stated: float | None

    @property
    def peak(self) -> float:
        """What MFU is relative to."""
        return self.stated or self.measured


def measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    side = SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    end, best = time.monotonic() + RATE_SECONDS, float("inf")
    while time.monotonic() < end:
        best = min(best, sample(lambda: torch.mm(a, b, out=out), device)[0].ms)
    return 2e3 * side**3 / best


def stated_peak(device_name: str) -> float | None:
    return next((peak for part, peak in STATED_PEAKS.items() if part in device_name), None)


class Row(NamedTuple):
    """One contender on one shape. Numbers are None where there is none, and the detail says why."""

    contender: str
    model: str
    dtype: str
    scenarios: int
    group: int
    rounds: int
    prefix: int
    context: int
    utterance: int
    tokens: int  # that our step computes at least
    micro_batch: int
    recompute: str
    liger: str
    status: Literal["measured", "off", "failed"]
    detail: str = ""
    steps: int = 0
    seconds: float | None = None
    seconds_low: float | None = None
    seconds_high: float | None = None
    forward_seconds: float | None = None
    loss_seconds: float | None = None
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    other_seconds: float | None = None  # packing, and what no phase counts
    passes: int | None = None
    computed_tokens: int | None = None
    logical_tokens: int | None = None
    computed_tokens_per_s: float | None = None
    logical_tokens_per_s: float | None = None
    mfu: float | None = None
    mfu_of_measured: float | None = None
    mfu_logical: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    peak_bytes: int | None = None

    @property
    def shape(self) -> Shape:
        return Shape(*(getattr(self, name) for name in Shape._fields))


class Setting(NamedTuple):
    """What all rows of a run have in common."""

    model: str
    dtype: str
    optimizer: OptimizerConfig
    sizes: Model
    rates: Rates


def make_row(name: str, result: list[Played] | Failed | str, workload: Workload, setting: Setting) -> Row:
    """`result` is what was played, or why nothing was."""
    shape = workload.shape
    o = setting.optimizer
    how = (o.micro_batch_tokens, o.recompute, o.liger)
    row = Row(name, setting.model, setting.dtype, *shape, shape.tokens, *how, status="measured")
    if isinstance(result, str):
        return row._replace(status="off", detail=result)
    if isinstance(result, Failed):
        return row._replace(status="failed", detail=result.why)
    first = result[0]

    def middle(phase: str) -> float:
        return median(getattr(played, f"{phase}_seconds") for played in result)

    seconds = median(played.seconds for played in result)
    phases = {f"{phase}_seconds": middle(phase) for phase in ("forward", "loss", "backward", "optimizer")}
    rate = setting.sizes.flop(first.work) / seconds
    return row._replace(
        steps=len(result),
        seconds=seconds,
        seconds_low=min(played.seconds for played in result),
        seconds_high=max(played.seconds for played in result),
        **phases,
        other_seconds=seconds - sum(phases.values()),
        passes=first.passes,
        computed_tokens=first.work.tokens,
        logical_tokens=first.logical_tokens,
        computed_tokens_per_s=first.work.tokens / seconds,
        logical_tokens_per_s=first.logical_tokens / seconds,
        mfu=rate / setting.rates.peak,
        mfu_of_measured=rate / setting.rates.measured,
        mfu_logical=setting.sizes.flop(Work.of_samples(workload.samples)) / seconds / setting.rates.peak,
        loss=first.loss,
        grad_norm=first.grad_norm,
        peak_bytes=max((played.peak_bytes for played in result if played.peak_bytes is not None), default=None),
    )


def summarise(rows: Sequence[Row], rates: Rates) -> dict[str, Any]:
    """The figures of one shape; its first row is whose speed is told."""
    ours = rows[0]
    speed = {row.contender: row.logical_tokens_per_s for row in rows}

    def speedup(other: str) -> float | None:
        mine, theirs = speed.get("ours"), speed.get(other)
        return mine / theirs if mine and theirs else None

    told = (
        "logical_tokens_per_s", "computed_tokens_per_s", "mfu", "mfu_of_measured", "mfu_logical", "seconds",
        "forward_seconds", "loss_seconds", "backward_seconds", "optimizer_seconds", "other_seconds", "computed_tokens",
        "logical_tokens", "peak_bytes",
    )  # fmt: skip
    return {
        "who": ours.contender,
        **{name: getattr(ours, name) for name in told},
        "prefix_shared_speedup": speedup("ours-separate"),
        "speedup_vs_hf": speedup("hf"),
        "measured_flop_per_s": rates.measured,
        "stated_flop_per_s": rates.stated,
        "logical_tokens_per_s_of": {name: value and round(value, 2) for name, value in speed.items()},
        "off": {row.contender: row.detail for row in rows if row.status != "measured"},
    }


def summarise_steps(results: dict[str, list[StepPlayed] | Failed | str]) -> dict[str, Any]:
    """Of full steps: how many times the trained tokens a second of TRL ours has, and what both are."""
    played = {name: result for name, result in results.items() if isinstance(result, list)}
    speed = {name: median(step.tokens_per_s for step in some) for name, some in played.items()}
    both = len(speed) == 2
    return {
        "step_speedup_vs_trl": speed["ours"] / speed["trl"] if both else None,
        "step_trained_tokens_per_s": {name: round(value, 2) for name, value in speed.items()},
        "step_seconds": {name: median(step.seconds for step in some) for name, some in played.items()},
        "step_rollout_seconds": median(step.rollout_seconds for step in played["ours"]) if "ours" in played else None,
        "step_prompt_tokens": {name: some[0].prompt_tokens for name, some in played.items()},
        "step_off": {name: str(getattr(r, "why", r)) for name, r in results.items() if name not in played},
    }


def print_table(rows: Sequence[Row]) -> None:
    heads = (
        "logical/s", "computed/s", "MFU", "of logical", "seconds", "forward", "loss", "backward", "optimizer", "other",
        "passes", "MiB",
    )  # fmt: skip
    print(f"  {'':<14}{''.join(f'{head:>11}' for head in heads)}")
    for row in rows:
        if row.seconds is None:
            print(f"  {row.contender:<14} {row.status}: {row.detail}")
            continue
        cells = (
            (row.logical_tokens_per_s, ",.1f"),
            (row.computed_tokens_per_s, ",.1f"),
            (row.mfu, ".1%"),
            (row.mfu_logical, ".1%"),
            (row.seconds, ",.2f"),
            (row.forward_seconds, ",.2f"),
            (row.loss_seconds, ",.2f"),
            (row.backward_seconds, ",.2f"),
            (row.optimizer_seconds, ",.2f"),
            (row.other_seconds, ",.2f"),
            (row.passes, ","),
            (row.peak_bytes and row.peak_bytes / 2**20, ",.0f"),
        )
        text = "".join(f"{'-' if value is None else format(value, form):>11}" for value, form in cells)
        print(f"  {row.contender:<14}{text}  {row.steps} times, loss {row.loss:.4f}, gradient {row.grad_norm:.4f}")
    sys.stdout.flush()
