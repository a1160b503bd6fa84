"""Everything that needs a GPU, in under eight minutes: exactness of every backend, decoding with CUDA graphs and
without, the loss's table of times, a profile.

    python -m benchmarks.gpu

Each stage has a share of the time and says what it had none left for. Results go to `benchmarks/results/` under the
name of the GPU: `exactness-*.csv`, `decode-*.csv`, `kernels-*.csv` with plots, `profile-*.txt` and a Chrome trace.
Exits with 1 when a backend is not exact.

Shapes: N tokens, M of them trained, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import decode
from benchmarks.kernels import RESULTS, chosen, print_table, result_path, stamp, summarise, write_results
from benchmarks.problem import Shape, lifted_hidden, make_problem
from benchmarks.providers import Provider
from benchmarks.suite import Row, measure_shape
from negotiator.loss import grpo_loss
from negotiator_kernels.reference import token_logprobs

SECONDS = {"exactness": 100.0, "decoding": 100.0, "table": 220.0}  # the profile takes a few
SHAPE_SECONDS = 15.0
TABLE = [Shape(n, d, 151_936, 0.45) for d in (4096, 5120) for n in (32_768, 8192, 16_384, 65_536)]
TABLE += [TABLE[1]._replace(fraction=f) for f in (0.1, 0.25, 0.7, 1.0)]
USUAL_SPREAD = 2.0
LOGPROB_LIMIT, GRADIENT_LIMIT = 1e-4, 2.5e-3  # absolute, and relative to the norm; given the same bf16 inputs

ALL: dict[str, Any] = {
    "temperature": 0.7,
    "clip_low": 0.1,
    "clip_high": 0.4,
    "beta": 0.1,
    "entropy_coef": 0.05,
    "importance": "truncate",
    "importance_cap": 1.2,
}


class Case(NamedTuple):
    name: str
    shape: Shape
    spread: float = USUAL_SPREAD  # standard deviation of the logits
    settings: dict[str, Any] = {}  # noqa: RUF012 it is never written to


class Finding(NamedTuple):
    backend: str
    case: str
    shape: str
    logprob_max_abs_error: float
    entropy_max_abs_error: float
    d_hidden_rel_error: float
    d_weight_rel_error: float
    exact: bool


def cases() -> list[Case]:
    usual, ragged = Shape(1024, 2048, 32_768, 0.45), Shape(1937, 896, 152_064, 0.45)
    odd = Shape(333, 584, 10_007, 0.6)
    return [
        Case("usual", usual),
        Case("peaked", usual, spread=8.0),
        Case("ragged", ragged),
        Case("odd", odd),
        Case("one row", odd._replace(tokens=1, fraction=1.0), settings={"clip_low": 0.9, "clip_high": 0.9}),
        Case("several chunks", Shape(10_240, 512, 151_936, 0.4)),
        *(Case(f"{name}, all settings", odd, settings={**ALL, "loss_type": name}) for name in LOSS_TYPES),
        *(Case(f"{name}={value}", odd, settings={name: value}) for name, value in ALL.items() if name in ALONE),
        Case("importance=mask", odd, settings={"importance": "mask", "importance_cap": 1.3}),
    ]


LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
ALONE = ("temperature", "beta", "entropy_coef")


def arguments(case: Case, device: torch.device) -> dict[str, Any]:
    """bf16 arguments of `grpo_loss`. Masked rows hold NaN and targets out of range. A sequence's log-ratios are on one
    side of the clip and far from it, so that no rounding moves a row across.
    """
    g = torch.Generator().manual_seed(0)
    n, d, v, _ = case.shape
    sequences = torch.arange(n) // 16
    targets = torch.randint(v, (n,), generator=g)
    weight = (torch.randn(v, d, generator=g) / d**0.5).bfloat16()
    hidden = lifted_hidden(torch.randn(n, d, generator=g), weight, targets, case.spread).bfloat16()
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.randperm(n, generator=g)[: case.shape.trained]] = True
    steps = torch.tensor([-0.5, -0.04, 0.04, 0.5])[torch.randint(4, (n,), generator=g)][sequences]
    gaps = {
        "old_logprobs": steps + 0.01 * torch.randn(n, generator=g),
        "sampling_logprobs": steps + 0.3 * torch.randn(n, generator=g),
        "ref_logprobs": 0.5 * torch.randn(n, generator=g),
    }
    advantages = torch.randn(n, generator=g)[sequences].masked_fill(sequences % 5 == 4, 0.0)

    hidden, weight, targets, mask = (x.to(device) for x in (hidden, weight, targets, mask))
    temperature = case.settings.get("temperature", 1.0)
    now, exact_weight = torch.full((n,), torch.nan, device=device), weight.double()
    for rows in mask.nonzero().squeeze(1).split(256):
        logprobs, _ = token_logprobs(hidden[rows].double(), exact_weight, targets[rows], temperature)
        now[rows] = logprobs.float()
    return {
        "hidden": hidden,
        "lm_head_weight": weight,
        "targets": targets.masked_fill(~mask, -1),
        "advantages": advantages.to(device).masked_fill(~mask, torch.nan),
        "mask": mask,
        "sequence_ids": sequences.to(device),
        **{name: now - gap.to(device) for name, gap in gaps.items()},
        **case.settings,
    }


def answer(given: dict[str, Any], dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
    """Log-probs [M], entropies [M], d_hidden [N, D] and d_weight [V, D]."""
    leaves = {name: given[name].detach().to(dtype).requires_grad_() for name in ("hidden", "lm_head_weight")}
    result = grpo_loss(**{**given, **leaves, "backend": backend})
    gradients = torch.autograd.grad(result.loss, tuple(leaves.values()))
    return result.logprobs[given["mask"]], result.entropy[given["mask"]], *gradients


def check(case: Case, backends: Sequence[str], device: torch.device) -> list[Finding]:
    """Every backend against the reference in fp64."""
    given = arguments(case, device)
    logprobs, entropy, *gradients = answer(given, torch.float64, "reference")
    findings = []
    for backend in backends:
        found_logprobs, found_entropy, *found_gradients = answer(given, torch.bfloat16, backend)
        errors = [
            (found_logprobs - logprobs).abs().max().item(),
            (found_entropy - entropy).abs().max().item(),
            *(((f - g).norm() / g.norm()).item() for f, g in zip(found_gradients, gradients, strict=True)),
        ]
        logprob_limit = LOGPROB_LIMIT * max(1.0, case.spread / USUAL_SPREAD)  # logits are rounded in proportion
        limits = (logprob_limit, 10 * logprob_limit, GRADIENT_LIMIT, GRADIENT_LIMIT)
        exact = all(error <= limit for error, limit in zip(errors, limits, strict=True))
        findings.append(Finding(backend, case.name, str(case.shape), *errors, exact))
        print(
            f"  {'ok  ' if exact else 'FAIL'} {backend:<12}{case.name:<24}", *(f"{e:.1e}" for e in errors), flush=True
        )
    return findings


def exactness(some: Sequence[Case], backends: Sequence[str], device: torch.device, seconds: float) -> list[Finding]:
    print("log-prob, entropy, d_hidden and d_weight errors", flush=True)
    end, findings = time.monotonic() + seconds, []
    for case in some:
        if time.monotonic() > end:
            print(f"  no time for {case.name}")
        else:
            findings += check(case, backends, device)
    return findings


def decoding(device: torch.device, seconds: float) -> tuple[list[decode.Row], list[str]]:
    """Times, and what was wrong."""
    end, rows, wrong = time.monotonic() + seconds, [], []
    for name, config in decode.MODELS.items():
        for dtype, limit in decode.ATTENTION_LIMITS.items():
            error = decode.attention_error(config, device, dtype)
            print(f"  {'ok  ' if error <= limit else 'FAIL'} attention of {name}, {dtype}: {error:.1e}", flush=True)
            wrong += [f"attention, {dtype}"] * (error > limit)
    for name, config in decode.MODELS.items():
        model = decode.make_model(config, device, torch.bfloat16)
        for prefix, running in itertools.product(decode.PREFIXES, decode.RUNNING):
            if time.monotonic() > end:
                print(f"  no time for {name}, {running} after {prefix}")
                continue
            found, difference = decode.measure_passes(name, model, running, prefix)
            found += decode.measure_attention(name, config, running, prefix, device)
            wrong += ["graphs"] * (difference > decode.LOGIT_LIMIT)
            for row in found:
                rate = "" if row.tokens_per_s is None else f"{row.tokens_per_s:10,.0f} tokens/s"
                print(f"  {name}, {running:3} after {prefix:5,}: {row.what:<36}{row.ms:9.3f} ms{rate}", flush=True)
            print(f"  {name}, {running:3} after {prefix:5,}: logits differ by {difference:.1e} at most", flush=True)
            rows += found
            torch.cuda.empty_cache()
    return rows, wrong


def graph_speedups(rows: Sequence[decode.Row]) -> dict[str, float]:
    """How much faster a pass is recorded, by model, number of sequences and prefix."""
    ms = {row[:4]: row.ms for row in rows}
    return {
        f"{name}, {running} after {prefix}": round(ms[name, running, prefix, "kernel by kernel"] / value, 2)
        for (name, running, prefix, what), value in ms.items()
        if what == "graphs"
    }


def table(
    shapes: Sequence[Shape], providers: Sequence[Provider], device: torch.device, seconds: float, out: Path
) -> list[Row]:
    """Written after every shape, so that what was measured is there whatever comes next."""
    end, rows = time.monotonic() + seconds, []
    for shape in shapes:
        if time.monotonic() > end:
            print(f"no time for {shape}")
            continue
        print(shape, flush=True)
        found = measure_shape(shape, providers, torch.bfloat16, device, SHAPE_SECONDS)
        print_table(found)
        rows += found
        write_results(rows, "bf16", device, out, "kernels")
    return rows


def profile_backend(provider: Provider, shape: Shape, device: torch.device, out: Path) -> None:
    """One warm call: where its time goes as text, and when as a trace for chrome://tracing."""
    problem = make_problem(shape, torch.bfloat16, device)
    provider.run(problem)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as record:
        provider.run(problem)
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = f"self_{device.type}_time_total" if device.type == "cpu" else "self_device_time_total"
    text = record.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=80)
    heading = f"{provider.name}, {shape}, bf16, {json.dumps(stamp(device))}\n"
    result_path(out, "profile", device, "txt").write_text(heading + text)
    record.export_chrome_trace(str(result_path(out, "trace", device, "json.gz")))
    print(heading + text, flush=True)


def write_csv(rows: Sequence[Any], fields: Sequence[str], name: str, device: torch.device, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with open(result_path(out, name, device, "csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*fields, *stamp(device)])
        writer.writeheader()
        writer.writerows(row._asdict() | stamp(device) for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and measures the GRPO loss and decoding on a GPU.")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    out = parser.parse_args(argv).out
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no CUDA device", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    start = time.monotonic()
    print(json.dumps(stamp(device)), flush=True)
    everybody = chosen(None)
    ours = [p for p in everybody if p.kind == "ours" and p.off_reason(device) is None]

    findings = exactness(cases(), [p.name for p in ours], device, SECONDS["exactness"])
    write_csv(findings, Finding._fields, "exactness", device, out)
    torch.cuda.empty_cache()
    decoded, not_equal = decoding(device, SECONDS["decoding"])
    write_csv(decoded, decode.Row._fields, "decode", device, out)
    torch.cuda.empty_cache()
    rows = table(TABLE, everybody, device, SECONDS["table"], out)
    figures = summarise([row for row in rows if row.shape == TABLE[0]])
    profile_backend(next(p for p in ours if p.name == figures["ours"]), TABLE[0], device, out)
    wrong = sorted({finding.backend for finding in findings if not finding.exact} | {*not_equal})
    figures |= {"graph_speedups": graph_speedups(decoded), "not_exact": wrong}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - start), **stamp(device)}))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
