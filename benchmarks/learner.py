"""How fast does the learner learn? Ours with and without shared prefixes, a Hugging Face loop, and TRL's GRPOTrainer.

    python -m benchmarks.learner --bar                   the shape that the project promises a speed for, alone
    python -m benchmarks.learner                         that shape, then steps of 4k to 64k tokens
    python -m benchmarks.learner --model qwen3-4b --tokens 16384 --contenders ours hf         one shape of your own

What is trained on: `benchmarks.learner_workload`. Who trains, in a process each: `benchmarks.learner_contenders`, and
`benchmarks.learner_steps` for full steps, which are compared for SmolLM2 on the CPU. On the CPU contenders take steps
by turns; on a GPU, whose memory two would not share, one after another. Figures are medians. A contender whose step of
the next size would take too long leaves the sweep.

A CSV and a plot go to `benchmarks/results/`; with --profile also a trace of one of our steps for chrome://tracing. The
last line on stdout is JSON about the first shape:

    logical_tokens_per_s    tokens of the samples, each with a prefix of its own, over the seconds of a step: packing,
                            forward, loss, backward, optimizer
    computed_tokens_per_s   tokens that were computed over the same seconds
    mfu                     operations for the computed tokens over seconds and peak: 6 for each weight of the linear
                            layers and token, and of the output embedding and trained row, and attention for what is
                            really seen. The peak is what the GPU's maker states for bf16, and elsewhere the measured
                            rate of large square products in the step's dtype; `mfu_of_measured` is over that anywhere
    mfu_logical             the same for the logical tokens: what separate sequences would have needed, which is what
                            published figures are about
    prefix_shared_speedup   seconds of `ours-separate` over those of `ours`
    speedup_vs_hf           seconds of `hf` over those of `ours`
    step_speedup_vs_trl     trained tokens a second of a full step over TRL's; null where `step_off` says why
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; see the Makefile

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import learner_steps
from benchmarks.gpu import write_csv
from benchmarks.kernels import RESULTS, device_name, draw_plots, result_path, stamp
from benchmarks.learner_contenders import HuggingFacePlayer, LearnerPlayer, Place, wait
from benchmarks.learner_report import (
    Rates,
    Row,
    Setting,
    make_row,
    measure_rate,
    print_table,
    stated_peak,
    summarise,
    summarise_steps,
)
from benchmarks.learner_steps import OurStepPlayer, TRLPlayer, trl_off_reason
from benchmarks.learner_workload import MODELS, Shape, Workload, make_workload, of_tokens
from benchmarks.processes import Failed, Player, Worker, await_ready, play_rounds
from benchmarks.workload import make_workload as make_prompts
from negotiator.config import ModelConfig, OptimizerConfig
from negotiator.flops import Model
from negotiator.models import choose_device, choose_dtype, load_tokenizer

BAR = Shape(scenarios=1, group=8, rounds=3, prefix=256, context=128, utterance=64)
WARM_UP = Shape(scenarios=1, group=2, rounds=1, prefix=16, context=8, utterance=4)
TOKENS = (4096, 8192, 16_384, 32_768, 65_536)
BAR_MODEL, BAR_TOKENS = {"cpu": "smollm2-135m", "cuda": "qwen3-4b"}, {"cpu": BAR.tokens, "cuda": 16_384}
STEP_MODEL, FOLDER = "smollm2-135m", Path(ModelConfig().path)
BUDGET_S = {"cpu": 150.0, "cuda": 10.0}  # for the rounds of a shape; the first is played in any case
STEP_LIMIT_S = 150.0  # a longer step is not tried
STEP_BUDGET_S = 60.0

Name = Literal["ours", "ours-separate", "hf"]


def learners(names: Sequence[Name], place: Place) -> dict[str, Callable[[], Player]]:
    everybody: dict[Name, Callable[[], Player]] = {
        "ours": functools.partial(LearnerPlayer, place, shared=True),
        "ours-separate": functools.partial(LearnerPlayer, place, shared=False),
        "hf": functools.partial(HuggingFacePlayer, place),
    }
    return {name: make for name, make in everybody.items() if name in names}


Results = dict[str, Any]  # of each contender: what it played, Failed, or why it played nothing


def measure(
    makers: Mapping[str, Callable[[], Player]], warm_up: Workload, workloads: Sequence[Workload], device: torch.device
) -> list[Results]:
    """The results on each of the workloads, which grow from the second on."""
    results: list[Results] = [{} for _ in workloads]
    together = [makers] if device.type == "cpu" else [{name: make} for name, make in makers.items()]
    for some in together:
        workers = {name: Worker(make, device, (warm_up,)) for name, make in some.items()}
        try:
            gone: Results = {**await_ready(workers)}
            for number, (workload, found) in enumerate(zip(workloads, results, strict=True)):
                print(f"{workload.shape}, {number + 1} of {len(workloads)}", flush=True)
                live = {name: worker for name, worker in workers.items() if name not in gone}
                found |= {**gone, **play_rounds(live, (workload,), BUDGET_S[device.type])}
                if number + 1 < len(workloads):
                    gone |= leaving(found, workloads[number + 1].shape.tokens / workload.shape.tokens)
        finally:
            for worker in workers.values():
                worker.close()
    return results


def leaving(found: Results, growth: float) -> Results:
    """Who takes no part in a workload so many times as large, and why."""
    failed = {name: result for name, result in found.items() if isinstance(result, Failed)}
    expected = {name: growth * r[0].seconds for name, r in found.items() if isinstance(r, list)}
    slow = {name: f"a step would take about {s:,.0f} s" for name, s in expected.items() if s > STEP_LIMIT_S}
    return {**failed, **slow}


def full_steps(model: str, device: torch.device, dtype: torch.dtype, wanted: bool) -> Results:
    """Ours and TRL's by turns."""
    if model != STEP_MODEL or device.type != "cpu" or not wanted:
        why = f"full steps are compared for {STEP_MODEL} on the CPU, without --tokens"
        return dict.fromkeys(("ours", "trl"), why)
    results: Results = {}
    makers: dict[str, Callable[[], Player]] = {"ours": functools.partial(OurStepPlayer, FOLDER, device, dtype)}
    if reason := trl_off_reason():
        results["trl"] = reason
    else:
        makers["trl"] = functools.partial(TRLPlayer, FOLDER, device, dtype)
    print(f"full steps: {learner_steps.BAR}", flush=True)
    tokenizer = load_tokenizer(FOLDER)
    warm_up, workload = (make_prompts(tokenizer, shape) for shape in (learner_steps.WARM_UP, learner_steps.BAR))
    workers = {name: Worker(make, device, (warm_up,)) for name, make in makers.items()}
    try:
        failed = await_ready(workers)
        live = {name: worker for name, worker in workers.items() if name not in failed}
        return {**results, **failed, **play_rounds(live, (workload,), STEP_BUDGET_S)}
    finally:
        for worker in workers.values():
            worker.close()


def profile_step(place: Place, workload: Workload, path: Path) -> None:
    """One warm step: where its time goes as text, and when as a trace."""
    print("profiling one of our steps", flush=True)
    player = LearnerPlayer(place, shared=True)
    player.play(workload)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (place.device.type == "cuda")
    with profile(activities=activities) as record:
        player.play(workload)
        wait(place.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    record.export_chrome_trace(str(path))
    by = "self_cpu_time_total" if place.device.type == "cpu" else "self_device_time_total"
    print(record.key_averages().table(sort_by=by, row_limit=20, max_name_column_width=80))
    print("wrote", path, flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return number

    usual, fields = OptimizerConfig(), OptimizerConfig.model_fields
    parser = argparse.ArgumentParser(description="Measures the learner against others on this machine.")
    parser.add_argument("--bar", action="store_true", help="only the model and the shape that a speed is promised for")
    parser.add_argument("--profile", action="store_true", help="write a trace of one of our steps as well")
    parser.add_argument("--model", type=str.lower, choices=MODELS, help="default: that of the bar on this device")
    parser.add_argument("--tokens", type=count, metavar="N", help="only steps of about so many computed tokens")
    parser.add_argument(
        "--micro-batch", type=count, default=usual.micro_batch_tokens, metavar="N", help="most tokens a pass"
    )
    for name in ("recompute", "liger"):
        choices, help_ = get_args(fields[name].annotation), fields[name].description
        parser.add_argument(f"--{name}", choices=choices, default=getattr(usual, name), help=f"ours: {help_}")
    parser.add_argument("--contenders", nargs="+", choices=get_args(Name), default=get_args(Name), help="default: all")
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: the trainer's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results (default: {RESULTS})")
    return parser.parse_args(argv)


class Plan(NamedTuple):
    model: str
    place: Place
    shapes: list[Shape]
    stem: str  # of the names of the results


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Raises ValueError with one sentence for whatever the user has to change."""
    device = choose_device(arguments.device)
    dtype, why = choose_dtype(arguments.dtype, device)
    if arguments.bar and (arguments.model or arguments.tokens):
        raise ValueError("--bar is a model and a shape of its own: leave out --model and --tokens")
    bar = of_tokens(BAR_TOKENS[device.type], BAR)
    if arguments.tokens:
        stem, shapes = "learner-own", [of_tokens(arguments.tokens, BAR)]
    elif arguments.bar:
        stem, shapes = "learner-bar", [bar]
    else:
        stem, shapes = "learner", list(dict.fromkeys([bar, *(of_tokens(tokens, BAR) for tokens in TOKENS)]))
    model = arguments.model or BAR_MODEL[device.type]
    print(f"{model} in {dtype}: {why}", flush=True)
    optimizer = OptimizerConfig(
        micro_batch_tokens=arguments.micro_batch,
        recompute=arguments.recompute,
        liger=arguments.liger,
        warmup_steps=0,  # others have none
    )
    return Plan(model, Place(MODELS[model], device, dtype, optimizer), shapes, stem)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        model, place, shapes, stem = make_plan(arguments)
    except ValueError as error:
        print(f"benchmarks.learner: {error}", file=sys.stderr)
        return 2
    device = place.device
    print(json.dumps(stamp(device)), flush=True)
    warm_up, *workloads = (make_workload(shape, place.config.vocab_size) for shape in (WARM_UP, *shapes))
    before = measure_rate(device, place.dtype)
    makers = learners(arguments.contenders, place)
    results = measure(makers, warm_up, workloads, device)
    steps = full_steps(model, device, place.dtype, wanted=not arguments.tokens)
    rates = Rates(max(before, measure_rate(device, place.dtype)), stated_peak(device_name(device)))
    setting = Setting(model, str(place.dtype), place.optimizer, Model.of(place.config), rates)

    rows: list[Row] = []
    for workload, found in zip(workloads, results, strict=True):
        some = [make_row(name, found[name], workload, setting) for name in makers]
        print(workload.shape)
        print_table(some)
        rows += some
    write_csv(rows, Row._fields, stem, device, arguments.out)
    path = result_path(arguments.out, stem, device, "csv")
    if any(row.seconds for row in rows):
        draw_plots("benchmarks.learner_plots", path)
    if arguments.profile:
        profile_step(place, workloads[0], result_path(arguments.out, f"{stem}-trace", device, "json.gz"))
    figures = summarise([row for row in rows if row.shape == shapes[0]], rates) | summarise_steps(steps)
    how = place.optimizer.model_dump(include={"micro_batch_tokens", "recompute", "liger"})
    about = {"model": model, "dtype": str(place.dtype), **how, **stamp(device)}
    print(json.dumps({**figures, "shape": shapes[0]._asdict(), **about}))
    return int(any(row.status == "failed" and row.contender == "ours" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
