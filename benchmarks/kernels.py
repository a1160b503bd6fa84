"""How fast, how lean and how exact is the GRPO loss? Ours against everybody's, forward and backward.

    python -m benchmarks.kernels --bar           the shape that the project promises a speed for, in about a minute
    python -m benchmarks.kernels                 that shape and sweeps around it
    python -m benchmarks.kernels --shapes 8192x4096x151936@0.45 --providers torch liger-grpo

Every provider turns hidden states and the output embedding into the masked loss (dapo, old log-probs given, clip 0.2)
and both gradients. Who they are: `benchmarks.providers`; the problem and the errors: `benchmarks.problem`; time and
memory: `benchmarks.measure`. The roofline is the time of the three bare matrix products over the trained rows, measured
in the same rounds, in bf16 or in fp32, whichever this machine multiplies faster.

A CSV and plots go to `benchmarks/results/`; the last line on stdout is JSON about the first shape. What the budget had
no time for is estimated from a sixteenth of the tokens or less, and named under `estimated`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; see the Makefile

import torch

from benchmarks.problem import Shape, parse_shape
from benchmarks.providers import NATIVE_CE, Provider, cpu_multiplies_bf16, providers, versions
from benchmarks.suite import Row, measure_shape

RESULTS = Path("benchmarks/results")
BAR = Shape(4096, 576, 49_152, 0.45)
FRACTIONS = (0.1, 0.25, 0.45, 0.7, 1.0)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BAR_SECONDS, SWEEP_SECONDS = 57.0, 15.0  # for a shape


def default_shapes(device: torch.device) -> list[Shape]:
    if device.type == "cuda":
        shapes = [Shape(n, d, 151_936, 0.45) for d in (4096, 5120) for n in (32_768, 8192, 16_384, 65_536)]
        base = Shape(8192, 4096, 151_936, 0.45)
    else:
        base = Shape(256, 576, 49_152, 0.45)
        shapes = [BAR, *(base._replace(tokens=n) for n in (64, 128, 256, 512))]
    shapes += [base._replace(fraction=f) for f in FRACTIONS]
    shapes += [base._replace(vocabulary=v) for v in (49_152, 151_936, 256_000)]
    shapes += [base._replace(hidden=d) for d in (576, 1536, 5120)]
    return list(dict.fromkeys(shapes))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.cpu.get_capabilities()['cpu_name']}, {torch.get_num_threads()} threads"


def summarise(rows: Sequence[Row]) -> dict[str, object]:
    """The figures of one shape. Ours is the fastest of our backends."""
    timed = sorted((row for row in rows if row.ms is not None), key=lambda row: row.ms or 0)

    def first(kind: str, prefix: str = "") -> Row | None:
        return next((row for row in timed if row.kind == kind and row.provider.startswith(prefix)), None)

    def value(row: Row | None, name: str) -> Any:
        return None if row is None else getattr(row, name)

    def ratio(above: Row | None, below: Row | None, name: str) -> float | None:
        a, b = value(above, name), value(below, name)
        return a / b if a is not None and b else None

    ours, best = first("ours"), first("rival")
    return {
        "ours": value(ours, "provider"),
        "speedup_vs_best": ratio(best, ours, "ms"),
        "best_other": value(best, "provider"),
        "speedup_vs_native_ce": ratio(first("cross-entropy", NATIVE_CE), ours, "ms"),
        "gemm_roofline_fraction": value(ours, "roofline_fraction"),
        "peak_memory_fraction": ratio(ours, first("rival", "plain"), "peak_bytes"),
        "logprob_max_abs_error": value(ours, "logprob_max_abs_error"),
        "grad_rel_error": value(ours, "grad_rel_error"),
        "ms": {row.provider: round(row.ms or 0, 3) for row in timed},
        "estimated": [row.provider for row in timed if row.status == "estimated"],
    }


def print_table(rows: Sequence[Row]) -> None:
    def text(value: float | None, width: int, form: str) -> str:
        return f"{'-' if value is None else format(value, form):>{width}}"

    print(f"  {'provider':<19}{'ms':>11}{'TFLOP/s':>10}{'roofline':>10}{'MiB':>9}{'log-prob err':>14}{'grad err':>10}")
    for row in sorted(rows, key=lambda row: (row.ms is None, row.ms)):
        if row.ms is None:
            print(f"  {row.provider:<19}{row.status}: {row.detail}")
            continue
        mib = None if row.peak_bytes is None else row.peak_bytes / 2**20
        cells = (
            text(row.ms, 11, ",.1f"),
            text(row.tflops, 10, ".3f"),
            text(row.roofline_fraction, 10, ".2f"),
            text(mib, 9, ",.0f"),
            text(row.logprob_max_abs_error, 14, ".1e"),
            text(row.grad_rel_error, 10, ".1e"),
        )
        print(f"  {row.provider:<19}{''.join(cells)}  {row.status} {row.detail or f'{row.rounds} times'}")
    sys.stdout.flush()


def stamp(device: torch.device) -> dict[str, str]:
    """What every result is kept with."""
    return {"device": device_name(device), **versions(), "date": date.today().isoformat()}


def result_path(folder: Path, stem: str, device: torch.device, suffix: str) -> Path:
    return folder / f"{stem}-{re.sub('[^a-z0-9]+', '-', device_name(device).lower()).strip('-')}.{suffix}"


def write_results(rows: Sequence[Row], dtype: str, device: torch.device, folder: Path, stem: str) -> None:
    """A CSV with one line a provider and shape, and plots beside it."""
    where = {"dtype": dtype, **stamp(device)}
    path = result_path(folder, stem, device, "csv")
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*asdict(rows[0]), *where])
        writer.writeheader()
        writer.writerows(asdict(row) | where for row in rows)
    draw_plots("benchmarks.plots", path)


def draw_plots(module: str, path: Path) -> None:
    """Pictures of a CSV that was written, by `module`.draw, where matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print(f"wrote {path}; no plots, as matplotlib is not installed: python -m {module} {path} draws them anywhere")
    else:
        print("wrote", path, *importlib.import_module(module).draw(path))


def chosen(names: Sequence[str] | None) -> list[Provider]:
    known = {p.name: p for p in providers()}
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no provider {name!r}; there are {', '.join(known)}")
    return [p for p in known.values() if names is None or p.name in names]


def main(argv: Sequence[str] | None = None) -> int:
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Measures the GRPO loss against other implementations.")
    parser.add_argument("--bar", action="store_true", help=f"only {BAR}, in bf16 unless --dtype says otherwise")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default_device)
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: bf16 where it is fast")
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--shapes", nargs="+", metavar="NxDxV@F", help="tokens, hidden size, vocabulary, part trained")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for each shape (57 for the bar, else 15)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the CSV and the plots")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    try:
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("torch finds no CUDA device")
        if arguments.bar and arguments.shapes:
            raise ValueError("--bar is a shape of its own: leave out --shapes")
        some = chosen(arguments.providers)
        shapes = [BAR] if arguments.bar else default_shapes(device)
        if arguments.shapes:
            shapes = [parse_shape(text) for text in arguments.shapes]
    except ValueError as error:
        print(f"benchmarks.kernels: {error}", file=sys.stderr)
        return 2

    fast_bf16 = arguments.bar or device.type == "cuda" or cpu_multiplies_bf16()
    dtype = arguments.dtype if arguments.dtype != "auto" else "bf16" if fast_bf16 else "fp32"
    print(f"{dtype} on {device_name(device)}, {versions()}", flush=True)
    all_rows: list[Row] = []
    for number, shape in enumerate(shapes, 1):
        print(f"{shape}, {number} of {len(shapes)}", flush=True)
        budget = arguments.budget or (BAR_SECONDS if shape == BAR else SWEEP_SECONDS)
        rows = measure_shape(shape, some, DTYPES[dtype], device, budget)
        print_table(rows)
        all_rows += rows
    write_results(all_rows, dtype, device, arguments.out, "bar" if arguments.bar else "kernels")
    figures = summarise([row for row in all_rows if row.shape == shapes[0]])
    print(json.dumps({**figures, "shape": str(shapes[0]), "dtype": dtype, **stamp(device)}))
    return int(any(row.kind == "ours" and row.status in ("oom", "failed") for row in all_rows))


if __name__ == "__main__":
    sys.exit(main())
