"""How fast is training from end to end, and where does the time of a step go?

    python -m benchmarks.throughput --quick              one shape, alone and under torchrun
    python -m benchmarks.throughput                      the same, the local judge, and steps that grow
    python -m benchmarks.throughput --model FOLDER --device cuda

Each run is the command itself, `python -m negotiator.train`, started anew and ended once its steps are done. Its first
step warms up and does not count. Seconds of phases are those of `metrics.jsonl`, of the first process; the seconds that
they have to add up to come from another clock, the dates of the transcripts' files. Every dialogue is one round of two
utterances; its reward is made up (`tells_apart`), so that all its tokens are trained, or the local judge's, whose cost
is the phase `judge`.

A CSV and a plot go to `benchmarks/results/`. The last line on stdout is JSON, about the first shape in one process:

    steps_per_s, trained_tokens_per_s, generated_tokens_per_s
    seconds                 of a step, by phase; `other` is what no phase has
    explained_fraction      the least of all runs: 1 less the part of a step that no phase has, or that two have
    scaling                 steps a second of --processes over those of one, which share a step's scenarios; null where
                            one of the two was not measured. Processes on one CPU share its cores as threads do, so 1
                            would mean that working together costs nothing; GPUs of their own could give their number
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; see the Makefile

import psutil
import torch

from benchmarks.gpu import write_csv
from benchmarks.kernels import RESULTS, draw_plots, result_path, stamp
from negotiator.config import Config, ModelConfig
from negotiator.models import choose_device, choose_dtype, load_tokenizer
from negotiator.types import Dialogue, Scenario

PHASES = ("rollout", "judge", "pack", "forward", "loss", "backward", "optimizer", "sync", "record", "evaluation")
WARM_UP_STEPS = 1
STEPS = {"cpu": 1, "cuda": 4}  # that count
RUN_LIMIT_S = 1800.0  # longest wait for the steps of a run
POLL_S, DOT_S, END_S = 0.2, 5.0, 30.0


class Shape(NamedTuple):
    """Of a step: dialogues, and the most tokens of each of their three texts."""

    scenarios: int
    group: int
    max_tokens: int

    def __str__(self) -> str:
        return f"{self.scenarios} x {self.group} dialogues, {self.max_tokens} tokens"


BASE = {"cpu": Shape(2, 2, 16), "cuda": Shape(8, 8, 128)}
FACTORS = {"scenarios": (0.5, 2), "group": (2, 4), "max_tokens": (2, 4)}
ROOM = {  # what a machine of its kind has the memory for
    "cpu": {"optimizer.micro_batch_tokens": 2048, "engine.cache_tokens": 8192},
    "cuda": {"optimizer.micro_batch_tokens": 8192, "engine.cache_tokens": 32768},
}

Judge = Literal["made-up", "local"]


class Case(NamedTuple):
    shape: Shape
    judge: Judge = "made-up"
    processes: int = 1

    def __str__(self) -> str:
        return f"{self.shape}, {self.judge} rewards, {self.processes} process{'es' * (self.processes > 1)}"


class Place(NamedTuple):
    model: Path
    device: torch.device
    threads: int  # of all processes together
    steps: int  # that count


class Row(NamedTuple):
    """A run. Numbers are None where it failed, and the detail says why; seconds are those of a step."""

    model: str
    dtype: str
    scenarios: int
    group: int
    max_tokens: int
    judge: Judge
    processes: int
    status: Literal["measured", "failed"]
    detail: str = ""
    steps: int | None = None
    steps_per_s: float | None = None
    trained_tokens_per_s: float | None = None
    generated_tokens_per_s: float | None = None
    explained_fraction: float | None = None
    seconds: float | None = None
    rollout_seconds: float | None = None
    judge_seconds: float | None = None
    pack_seconds: float | None = None
    forward_seconds: float | None = None
    loss_seconds: float | None = None
    backward_seconds: float | None = None
    optimizer_seconds: float | None = None
    sync_seconds: float | None = None
    record_seconds: float | None = None
    evaluation_seconds: float | None = None
    other_seconds: float | None = None


def tells_apart(scenario: Scenario, dialogue: Dialogue) -> float:
    """A reward that no dialogue has in common with the mean of its group, or its tokens would not be trained."""
    return float(dialogue.index % 2)


def cases(base: Shape, processes: int, quick: bool) -> list[Case]:
    """The base shape in all ways, then shapes that differ from it in one thing."""
    some = [Case(base), Case(base, processes=processes)] if processes > 1 else [Case(base)]
    if quick:
        return some
    grown = [
        Case(base._replace(**{axis: round(factor * getattr(base, axis))}))
        for axis, factors in FACTORS.items()
        for factor in factors
    ]
    return [*some, Case(base, "local"), *grown]


# -- a run -------------------------------------------------------------------------------------------------------------


def arguments_of(case: Case, place: Place, folder: Path) -> list[str]:
    """Of the trainer, which writes to `folder` and does one step more than is waited for, so that none is the last."""
    agreement, reward = {
        "made-up": ("negotiator.judges.rewards:after_a_round", "benchmarks.throughput:tells_apart"),
        "local": ("local", "local"),
    }[case.judge]
    settings = {
        "runs": folder.parent,
        "name": folder.name,
        "steps": WARM_UP_STEPS + place.steps + 1,
        "checkpoint.every": WARM_UP_STEPS + place.steps + 1,
        "model.path": place.model,
        "model.device": place.device.type,
        "rollout.scenarios": case.shape.scenarios,
        "rollout.group_size": case.shape.group,
        "dialogue.max_rounds": 1,
        "dialogue.max_tokens": case.shape.max_tokens,
        "dialogue.completion_max_tokens": case.shape.max_tokens,
        "judge.agreement": agreement,
        "judge.reward": reward,
        "judge.agree_threshold": 1e-9,  # whatever the local judge says: it is asked, and every dialogue gets a reward
        **ROOM[place.device.type],
    }
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run(case: Case, place: Place, folder: Path) -> str | None:
    """Returns when the steps are done, or why they are not."""
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.processes)]
    command = [sys.executable, *(together if case.processes > 1 else ()), "-m", "negotiator.train"]
    threads = {"OMP_NUM_THREADS": str(max(1, place.threads // case.processes))}
    with tempfile.TemporaryFile("w+") as printed:
        words = [*command, *arguments_of(case, place, folder)]
        trainer = subprocess.Popen(words, stdout=printed, stderr=subprocess.STDOUT, env=os.environ | threads)
        try:
            why = _wait(trainer, folder / "metrics.jsonl", WARM_UP_STEPS + place.steps)
        finally:
            _end(trainer)
        if why:
            printed.seek(0)
            said = printed.read()
            print(f"\n{said}", file=sys.stderr)
            why += next((f": {line}" for line in said.splitlines() if line.startswith("error: ")), "")
        return why


def _wait(trainer: subprocess.Popen[bytes], metrics: Path, steps: int) -> str | None:
    started = told = time.monotonic()
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        if trainer.poll() is not None:
            return f"the trainer ended with exit code {trainer.returncode}"
        now = time.monotonic()
        if now - started > RUN_LIMIT_S:
            return f"the trainer had not done its steps after {RUN_LIMIT_S:.0f} s"
        if now - told > DOT_S:
            told = now
            print(".", end="", flush=True)
        time.sleep(POLL_S)
    return None


def _end(trainer: subprocess.Popen[bytes]) -> None:
    """At once: nothing that it would save is of use to anybody."""
    if trainer.poll() is None:
        agent = psutil.Process(trainer.pid)
        processes = [agent, *agent.children(recursive=True)]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        trainer.wait()
        psutil.wait_procs(processes, timeout=END_S)


# -- its figures -------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Of the steps that count: their lines of metrics, and the seconds that they took by the clock that dates files."""

    steps: list[dict[str, Any]]
    seconds: float


def read(folder: Path, steps: int) -> Found:
    text = (folder / "metrics.jsonl").read_text().splitlines()[: WARM_UP_STEPS + steps]  # it may have come further
    lines = [json.loads(line) for line in text]
    dates = [(folder / "transcripts" / f"step-{line['step']:05d}.jsonl").stat().st_mtime for line in lines]
    return Found(lines[WARM_UP_STEPS:], dates[-1] - dates[WARM_UP_STEPS - 1])


def measured(model: str, dtype: str, case: Case, found: Found) -> Row:
    count = len(found.steps)
    assert all(step["seconds"].keys() == {"step", *PHASES} for step in found.steps), "a phase is not told here"
    phases = {phase: sum(step["seconds"][phase] for step in found.steps) / count for phase in PHASES}
    seconds = found.seconds / count
    other = seconds - math.fsum(phases.values())
    return Row(
        model,
        dtype,
        *case.shape,
        case.judge,
        case.processes,
        "measured",
        steps=count,
        steps_per_s=1 / seconds,
        trained_tokens_per_s=sum(step["trained_tokens"] for step in found.steps) / found.seconds,
        generated_tokens_per_s=sum(step["generated_tokens"] for step in found.steps) / found.seconds,
        explained_fraction=1 - abs(other) / seconds,
        seconds=seconds,
        other_seconds=other,
        **{f"{phase}_seconds": value for phase, value in phases.items()},
    )


def measure(model: str, dtype: str, case: Case, place: Place) -> Row:
    runs = Config().runs
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=runs) as folder:
        path = Path(folder) / "run"
        if why := run(case, place, path):
            return Row(model, dtype, *case.shape, case.judge, case.processes, "failed", why)
        return measured(model, dtype, case, read(path, place.steps))


def print_row(row: Row) -> None:
    if row.seconds is None:
        print(row.detail, flush=True)
        return
    print(
        f" {row.seconds:.2f} s a step, {row.trained_tokens_per_s:,.1f} trained and {row.generated_tokens_per_s:,.1f} "
        f"generated tokens/s, {row.explained_fraction:.1%} explained"
    )
    shares = {name: getattr(row, f"{name}_seconds") / row.seconds for name in (*PHASES, "other")}
    print("   ", ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if abs(share) >= 5e-4), flush=True)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """As the head of this file defines it; the first row is of one process."""
    first, many = rows[0], next((row for row in rows if row.processes > 1), None)
    explained = [row.explained_fraction for row in rows if row.explained_fraction is not None]
    scaling = None
    if first.steps_per_s and many and many.steps_per_s:
        scaling = many.steps_per_s / first.steps_per_s
    return {
        "steps_per_s": first.steps_per_s,
        "trained_tokens_per_s": first.trained_tokens_per_s,
        "generated_tokens_per_s": first.generated_tokens_per_s,
        "seconds": {phase: getattr(first, f"{phase}_seconds") for phase in (*PHASES, "other")},
        "explained_fraction": min(explained, default=None),
        "scaling": scaling,
        "processes": many.processes if many else 1,
    }


# -- the command -------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures whole training steps and where their time goes.")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--model", type=Path, default=Path(ModelConfig().path), help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="of the run under torchrun, none if 1 (default: 2, or all GPUs)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results (default: {RESULTS})")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        device = choose_device(arguments.device)
        dtype, why = choose_dtype("auto", device)
        load_tokenizer(arguments.model)
        base = BASE[device.type]
        most = base.scenarios if device.type == "cpu" else min(base.scenarios, torch.cuda.device_count())
        processes = most if arguments.processes is None else arguments.processes
        if not 1 <= processes <= most:
            raise ValueError(f"--processes must be from 1 to {most}: each needs a scenario, and on a GPU its own")
    except (ValueError, OSError) as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        return 2
    print(json.dumps(stamp(device)), flush=True)
    print(f"{arguments.model} in {dtype}: {why}", flush=True)
    place = Place(arguments.model, device, torch.get_num_threads(), STEPS[device.type])
    rows = []
    todo = cases(base, processes, arguments.quick)
    for number, case in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {case} ", end="", flush=True)
        rows.append(measure(arguments.model.name, str(dtype), case, place))
        print_row(rows[-1])

    stem = "throughput-quick" if arguments.quick else "throughput"
    write_csv(rows, Row._fields, stem, device, arguments.out)
    path = result_path(arguments.out, stem, device, "csv")
    if any(row.seconds for row in rows):
        draw_plots("benchmarks.throughput_plots", path)
    about = {"shape": base._asdict(), "model": rows[0].model, "dtype": rows[0].dtype, **stamp(device)}
    print(json.dumps(summarise(rows) | about))
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
