"""How fast are dialogues generated? Ours against Hugging Face `generate` and SGLang on the same machine.

    python -m benchmarks.rollout --bar                   the shape that the project promises a speed for, alone
    python -m benchmarks.rollout                         that shape, then group sizes of 1-32 and prefixes of 64-2,048
    python -m benchmarks.rollout --engine embedded --group 32 --new-tokens 16     a shape of your own

What is asked: `benchmarks.workload`. Who is asked, in a process each: `benchmarks.contenders`. Rounds are by turns: one
each, then up to four more of those that the time is enough for. Figures are medians. Tokens per second are new tokens
over all seconds from the first prefix to the last token. Our engine runs in the trainer's dtype here, and in bf16.

A CSV and a plot go to `benchmarks/results/`; the last line on stdout is JSON about the first shape:

    tokens_per_s                    `ours`: the embedded engine in the trainer's dtype (with --engine, whoever is first)
    speedup_vs_hf                   over Hugging Face in bf16, which is what the bar names; `_fp32`: in fp32;
                                    `_shared_prefix`: in its quicker dtype, with prefixes computed once
    speedup_vs_sglang               null where it is not installed; `off` says why
    prefill_growth_g1_to_g32        prompt tokens that our engine computed at G = 32, less each dialogue's own, over the
                                    same at G = 1, the scenarios and the prefix being those of the shape: exactly 1 when
                                    every prefix is computed once; the bar is 1.05
    prefill_seconds_growth_g1_to_g32   the same of seconds of prefill, counting of those the part that tokens which are
                                    nobody's own have in all that were computed
    cached_fraction_of_ideal        cached prompt tokens over what a perfect, at first empty cache would have reused
    estimated                       whose figures are no measurements (`benchmarks.hf_generate` has the rule)
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported; see the Makefile

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.contenders import DTYPES, Contender, Place, make_player
from benchmarks.kernels import RESULTS, device_name, result_path
from benchmarks.processes import ANSWER_S, START_S, Failed, Worker, await_ready, play_rounds
from benchmarks.rollout_report import Row, make_row, print_table, summarise, write_results
from benchmarks.workload import OWN, Shape, Workload, make_workload
from negotiator.config import EngineConfig
from negotiator.models import choose_device, choose_dtype, load_model_config, load_tokenizer

MODEL = Path("models/SmolLM2-135M-Instruct")
BAR = Shape(scenarios=4, group=8, prefix=256, new_tokens=64)
SWEEP = {"cpu": Shape(1, 8, 256, 32), "cuda": BAR}
GROUPS, PREFIXES = (1, 2, 4, 8, 16, 32), (64, 128, 256, 512, 1024, 2048)
WARM_UP = Shape(1, 2, 16, 2)
GROWTH_ROUNDS = 3
BAR_SECONDS, SWEEP_SECONDS = 150.0, 15.0  # for the rounds of a shape; the first is played in any case
BAR_LIMIT, SWEEP_LIMIT = 120.0, 20.0  # seconds of a round above which Hugging Face's is estimated

GROWTH = ("prefill_growth_g1_to_g32", "prefill_seconds_growth_g1_to_g32")
Engine = Literal["embedded", "hf", "sglang"]


def contenders(engines: Iterable[Engine], ours: Literal["fp32", "bf16"], device: torch.device) -> list[Contender]:
    """Those of `engines`, ours first; the others' dtypes are the ones they are quickest in, and what the bar names."""
    quick: Literal["fp32", "bf16"] = "bf16" if choose_dtype("auto", device)[0] == torch.bfloat16 else "fp32"
    by_engine: dict[Engine, list[Contender]] = {
        "embedded": [Contender("embedded", ours), Contender("embedded", "bf16")],
        "sglang": [Contender("sglang", quick)],
        "hf": [Contender("hf", quick), Contender("hf", "fp32"), Contender("hf", "bf16"), Contender("hf-shared", quick)],
    }
    return list(dict.fromkeys(c for engine, some in by_engine.items() if engine in engines for c in some))


def sweep(base: Shape) -> list[Shape]:
    """Those that differ from `base` in the size of the group, and in the prefix."""
    return [base._replace(group=g) for g in GROUPS] + [base._replace(prefix=p) for p in PREFIXES]


def prefill_growth(worker: Worker, tokenizer: PreTrainedTokenizerBase, shape: Shape) -> dict[str, float | None]:
    """Prefill at G = 32 over G = 1 without the dialogues' own tokens, as the head of this file defines it."""
    workloads = {g: make_workload(tokenizer, shape._replace(group=g, new_tokens=1)) for g in (1, 32)}
    tokens: dict[int, int] = {}
    seconds: dict[int, list[float]] = {g: [] for g in workloads}
    for number in range(GROWTH_ROUNDS):
        for group, workload in workloads.items():
            print(f"  round {number + 1}, prefill at G = {group} ... ", end="", flush=True)
            played = worker.play(workload, BAR_LIMIT)
            if isinstance(played, Failed):
                print(played.why, flush=True)
                return dict.fromkeys(GROWTH)
            print(f"{played.prefill_seconds:,.2f} s", flush=True)
            computed = played.prompt_tokens - played.cached_tokens
            tokens[group] = computed - OWN * workload.shape.dialogues
            seconds[group].append(played.prefill_seconds * tokens[group] / computed)
    return dict(zip(GROWTH, (tokens[32] / tokens[1], median(seconds[32]) / median(seconds[1])), strict=True))


def measure(
    workers: Mapping[str, Worker], workloads: Sequence[Workload], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Row], dict[str, float | None]]:
    """A row for everybody on the first workload, on the others for those worth a sweep, and the growth of prefill."""
    failed = await_ready(workers)
    live = {name: worker for name, worker in workers.items() if name not in failed}
    rows = [make_row(name, why, workloads[0]) for name, why in failed.items()]
    growth: dict[str, float | None] = dict.fromkeys(GROWTH)
    for number, workload in enumerate(workloads):
        print(f"{workload.shape}, {number + 1} of {len(workloads)}", flush=True)
        budget, limit = (SWEEP_SECONDS, SWEEP_LIMIT) if number else (BAR_SECONDS, BAR_LIMIT)
        found = [make_row(n, r, workload) for n, r in play_rounds(live, (workload, limit), budget).items()]
        print_table(found)
        rows += found
        gone = {row.contender for row in found if row.status == "failed"}
        if number == 0:
            gone |= slower_hugging_face(found)
        live = {name: worker for name, worker in live.items() if name not in gone}
        ours = next((worker for name, worker in live.items() if name.startswith("embedded")), None)
        if number == 0 and ours:
            growth = prefill_growth(ours, tokenizer, workload.shape)
    return rows, growth


def slower_hugging_face(rows: Sequence[Row]) -> set[str]:
    """Plain `generate` in all dtypes but its quickest: no sweep needs them."""
    some = [row for row in rows if row.contender.rpartition("-")[0] == "hf"]
    return {row.contender for row in sorted(some, key=lambda row: row.tokens_per_s or 0)[:-1]}


def describe(place: Place) -> dict[str, str]:
    """What every result is kept with."""
    found = place.config.python.parents[1].glob("lib/python*/site-packages/sglang-*.dist-info")
    return {
        "model": place.model.name,
        "device": device_name(place.device),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "sglang": next((path.name.removeprefix("sglang-").removesuffix(".dist-info") for path in found), ""),
        "date": date.today().isoformat(),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def count(text: str) -> int:
        if (number := int(text)) < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return number

    parser = argparse.ArgumentParser(description="Measures the generation of dialogues against others on this machine.")
    parser.add_argument("--bar", action="store_true", help=f"only {BAR}")
    parser.add_argument("--engine", nargs="+", choices=get_args(Engine), default=get_args(Engine), help="default: all")
    parser.add_argument("--model", type=Path, default=MODEL, help=f"a Hugging Face folder (default: {MODEL})")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of our engine; auto: the trainer's")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    for name, help_ in (
        ("--scenarios", "with this or any of the next three: a shape of your own, the rest of it as for the bar"),
        ("--group", "dialogues of a scenario"),
        ("--prefix", "tokens that they share"),
        ("--new-tokens", "tokens of a dialogue"),
    ):
        parser.add_argument(name, type=count, metavar="N", help=help_)
    parser.add_argument("--out", type=Path, default=RESULTS, help=f"folder of the results (default: {RESULTS})")
    return parser.parse_args(argv)


def chosen_shapes(arguments: argparse.Namespace, device: torch.device) -> tuple[str, list[Shape]]:
    """The shapes and the stem of the names of their results."""
    own = {name: value for name in Shape._fields if (value := getattr(arguments, name)) is not None}
    if own and arguments.bar:
        raise ValueError(f"--bar is a shape of its own: leave out --{next(iter(own)).replace('_', '-')}")
    if own:
        return "rollout-own", [BAR._replace(**own)]
    if arguments.bar:
        return "rollout-bar", [BAR]
    return "rollout", list(dict.fromkeys([BAR, *sweep(SWEEP[device.type])]))


class Plan(NamedTuple):
    tokenizer: PreTrainedTokenizerBase
    workloads: list[Workload]
    place: Place
    contenders: list[Contender]
    off: dict[str, str]  # why those that are not here do not take part
    stem: str  # of the names of the results


def make_plan(arguments: argparse.Namespace) -> Plan:
    """Raises ValueError with one sentence for whatever the user has to change."""
    device = choose_device(arguments.device)
    dtype, why = choose_dtype(arguments.dtype, device)
    stem, shapes = chosen_shapes(arguments, device)
    context = getattr(load_model_config(arguments.model), "max_position_embeddings", None)
    longest = max(shape.length for shape in shapes)
    if context is not None and longest > context:
        raise ValueError(f"a dialogue of {longest} tokens does not fit the model's context of {context}")
    usual = EngineConfig()
    config = EngineConfig(
        recovery_timeout_s=START_S,
        max_running=max(usual.max_running, *(shape.dialogues for shape in shapes)),
        cache_tokens=max(usual.cache_tokens, *(shape.cache_tokens for shape in shapes)),
    )
    ours: Literal["fp32", "bf16"] = "bf16" if dtype == torch.bfloat16 else "fp32"
    some = contenders(arguments.engine, ours, device)
    off = {}
    if not config.python.is_file():
        off = {c.name: f"{config.python} is not there: `make sglang`" for c in some if c.engine == "sglang"}
    if len(off) == len(some):
        raise ValueError(next(iter(off.values())))
    tokenizer = load_tokenizer(arguments.model)
    workloads = [make_workload(tokenizer, shape) for shape in shapes]
    print(f"our dtype is {ours}: {why}", flush=True)
    return Plan(tokenizer, workloads, Place(arguments.model, device, config), some, off, stem)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        plan = make_plan(arguments)
    except ValueError as error:
        print(f"benchmarks.rollout: {error}", file=sys.stderr)
        return 2
    place, first = plan.place, plan.workloads[0].shape
    about = describe(place)
    names = [c.name for c in plan.contenders if c.name not in plan.off]
    print(f"{about}\nstarting {', '.join(names)}", flush=True)
    warm_up = make_workload(plan.tokenizer, WARM_UP)
    some = {c.name: functools.partial(make_player, c, place) for c in plan.contenders if c.name in names}
    workers = {name: Worker(make, place.device, (warm_up, ANSWER_S)) for name, make in some.items()}
    try:
        rows, growth = measure(workers, plan.workloads, plan.tokenizer)
    finally:
        for worker in workers.values():
            worker.close()

    rows += [Row(name, *first, status="off", detail=why) for name, why in plan.off.items()]
    order = [c.name for c in plan.contenders]
    rows.sort(key=lambda row: (row.shape != first, order.index(row.contender) if row.shape == first else 0))
    write_results(rows, about, result_path(arguments.out, plan.stem, place.device, "csv"))
    figures = summarise([row for row in rows if row.shape == first])
    print(json.dumps({**figures, **growth, "shape": first._asdict(), **about}))
    return int(any(row.status == "failed" and row.contender.startswith("embedded") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
