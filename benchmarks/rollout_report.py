"""What the rollout benchmark tells: a row for each contender and shape, the table, the CSV, the figures of a shape."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from benchmarks.contenders import Played
from benchmarks.kernels import draw_plots
from benchmarks.processes import Failed
from benchmarks.workload import Shape, Workload


@dataclass(frozen=True, slots=True)
class Row:
    """One contender on one shape. Numbers are None where there is none, and the detail says why."""

    contender: str
    scenarios: int
    group: int
    prefix: int
    new_tokens: int
    status: Literal["measured", "estimated", "off", "failed"]
    detail: str = ""
    rounds: int = 0
    tokens_per_s: float | None = None
    tokens_per_s_low: float | None = None
    tokens_per_s_high: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    update_seconds: float | None = None
    computed_prompt_tokens: int | None = None
    cached_fraction_of_ideal: float | None = None
    peak_bytes: int | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.scenarios, self.group, self.prefix, self.new_tokens)


def make_row(name: str, result: list[Played] | Failed, workload: Workload) -> Row:
    if isinstance(result, Failed):
        return Row(name, *workload.shape, status="failed", detail=result.why)
    updates = [p.update_seconds for p in result if p.update_seconds is not None]
    peaks = [p.peak_bytes for p in result if p.peak_bytes is not None]
    return Row(
        name,
        *workload.shape,
        status="estimated" if result[0].estimated_from else "measured",
        detail=result[0].estimated_from,
        rounds=len(result),
        tokens_per_s=median(p.tokens_per_s for p in result),
        tokens_per_s_low=min(p.tokens_per_s for p in result),
        tokens_per_s_high=max(p.tokens_per_s for p in result),
        prefill_seconds=median(p.prefill_seconds for p in result),
        decode_seconds=median(p.decode_seconds for p in result),
        update_seconds=median(updates) if updates else None,
        computed_prompt_tokens=max(p.prompt_tokens - p.cached_tokens for p in result),
        cached_fraction_of_ideal=min(p.cached_tokens for p in result) / workload.reusable_tokens(),
        peak_bytes=max(peaks, default=None),
    )


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of one shape; its first row is whose speed is told."""
    speed = {row.contender: row.tokens_per_s for row in rows}
    ours = rows[0]

    def speedup(other: str | None) -> float | None:
        theirs = speed.get(other) if other else None
        is_ours = ours.contender.startswith("embedded")
        return ours.tokens_per_s / theirs if is_ours and ours.tokens_per_s and theirs else None

    def quickest(engine: str) -> str | None:
        some = [row.contender for row in rows if row.contender.rpartition("-")[0] == engine and row.tokens_per_s]
        return max(some, key=lambda name: speed[name] or 0, default=None)

    hf = quickest("hf")
    return {
        "ours": ours.contender,
        "tokens_per_s": ours.tokens_per_s,
        "speedup_vs_hf": speedup("hf-bf16"),
        "speedup_vs_hf_fp32": speedup("hf-fp32"),
        "speedup_vs_hf_shared_prefix": speedup(quickest("hf-shared")),
        "hf_dtype_fastest": hf and hf.rpartition("-")[2],
        "speedup_vs_sglang": speedup(quickest("sglang")),
        "cached_fraction_of_ideal": ours.cached_fraction_of_ideal,
        "prefill_seconds": ours.prefill_seconds,
        "decode_seconds": ours.decode_seconds,
        "peak_bytes": ours.peak_bytes,
        "tokens_per_s_of": {row.contender: row.tokens_per_s and round(row.tokens_per_s, 2) for row in rows},
        "estimated": [row.contender for row in rows if row.status == "estimated"],
        "off": {row.contender: row.detail for row in rows if row.status in ("off", "failed")},
    }


def print_table(rows: Sequence[Row]) -> None:
    heads = ("tokens/s", "lowest", "highest", "prefill s", "decode s", "computed", "of ideal", "MiB", "update s")
    print(f"  {'':<14}{''.join(f'{head:>11}' for head in heads)}")
    for row in rows:
        if row.tokens_per_s is None:
            print(f"  {row.contender:<14} {row.status}: {row.detail}")
            continue
        cells = (
            (row.tokens_per_s, ",.1f"),
            (row.tokens_per_s_low, ",.1f"),
            (row.tokens_per_s_high, ",.1f"),
            (row.prefill_seconds, ",.2f"),
            (row.decode_seconds, ",.2f"),
            (row.computed_prompt_tokens, ","),
            (row.cached_fraction_of_ideal, ".3f"),
            (row.peak_bytes and row.peak_bytes / 2**20, ",.0f"),
            (row.update_seconds, ",.2f"),
        )
        text = "".join(f"{'-' if value is None else format(value, form):>11}" for value, form in cells)
        print(f"  {row.contender:<14}{text}  {row.status} {row.detail or f'{row.rounds} times'}")
    sys.stdout.flush()


def write_results(rows: Sequence[Row], about: dict[str, str], path: Path) -> None:
    """A CSV with one line a contender and shape, and a plot beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *about])
        writer.writeheader()
        writer.writerows(asdict(row) | about for row in rows)
    draw_plots("benchmarks.rollout_plots", path)
