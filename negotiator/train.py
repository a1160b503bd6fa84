"""The main job: negotiate, judge, compare, learn; once a step.

    python -m negotiator.train --config configs/quickstart.yaml
    python -m negotiator.train --config configs/quickstart.yaml --dry-run
    python -m negotiator.train --resume runs/quickstart

    scenarios = draw_scenarios()
    groups    = rollout.run()              dialogues, each utterance with its exact token ids, judged
                advantages.assign()        each dialogue against its group
    batches   = pack()                     shared prefixes once, turn samples after them
    stats     = learner.step()             hidden states -> masked GRPO loss -> AdamW
                engine.update_weights()    a new version; no key or value of the old one survives
                folder.log_step()          metrics, transcripts, checkpoint

Left out here: more than one process, evaluation.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
from collections.abc import Coroutine, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from negotiator import advantages, checkpoint, rollout
from negotiator.config import (
    Config,
    OneSentenceParser,
    add_config_arguments,
    config_overrides,
    dump_config,
    load_config,
)
from negotiator.data import draw_scenarios
from negotiator.engines.base import EngineStats
from negotiator.loss import default_denominator
from negotiator.packing import pack, turn_samples
from negotiator.report.metrics import Stopwatch, step_metrics
from negotiator.report.progress import TrainingProgress
from negotiator.report.recorder import RunFolder
from negotiator.report.transcript import best_dialogue, render
from negotiator.setup import Checked, Run, check, prepare
from negotiator.types import DialogueGroup


async def train(run: Run, folder: RunFolder, progress: TrainingProgress) -> list[DialogueGroup]:
    """Runs the remaining steps and returns the dialogues of the last one."""
    try:
        return await _steps(run, folder, progress)
    finally:
        for used in (run.table.engine, run.table.agreement, run.table.reward):
            await used.close()


async def _steps(run: Run, folder: RunFolder, progress: TrainingProgress) -> list[DialogueGroup]:
    config, learner = run.checked.config, run.learner
    table = dataclasses.replace(run.table, on_utterance=progress.utterance)
    weights = dict(learner.model.named_parameters()).items()
    progress.phase("starting the engine")
    await table.engine.update_weights(weights, version=run.steps_done)

    def negotiate(step: int) -> Coroutine[Any, Any, list[DialogueGroup]]:
        dilemmas, pairs = run.checked.dilemmas, run.checked.pairs
        scenarios = draw_scenarios(dilemmas, pairs, config.seed, step, config.rollout.scenarios)
        return rollout.run(table, step, scenarios, config.rollout.group_size)

    groups: list[DialogueGroup] = []
    ahead: asyncio.Task[list[DialogueGroup]] | None = None  # the dialogues of the next step
    for step in range(run.steps_done, config.steps):
        clock = Stopwatch()
        engine_before, judge_before = engine_stats(run)

        progress.phase("negotiating")
        if run.local:
            run.local.engine.flush()  # a resumed run finds it empty, so an uninterrupted one must too
            await run.local.judge.warm()
        groups = await (ahead or negotiate(step))
        ahead = asyncio.create_task(negotiate(step + 1)) if config.rollout.ahead and step + 1 < config.steps else None
        spread = advantages.assign(groups)
        if not spread.valid_dialogues:
            raise RuntimeError(f"all dialogues of step {step + 1} failed; the first: {groups[0].dialogues[0].failure}")
        clock.lap("rollout")

        samples = turn_samples(groups, config.loss.train_roles)
        denominator = default_denominator(config.loss.type, [len(sample.response_ids) for sample in samples])
        # Without an advantage or an entropy bonus a sample moves nothing; it still counts in the denominator.
        moving = [s for s in samples if s.advantage != 0 or config.loss.entropy_coef > 0]
        batches = pack(moving, config.optimizer.micro_batch_tokens)
        clock.lap("pack")

        progress.phase("learning")
        if ahead:
            learned = await asyncio.to_thread(learner.step, step, batches, denominator)
        else:
            await table.engine.release()
            learned = learner.step(step, batches, denominator)
        clock.lap("learn")

        progress.phase("sending weights")
        await table.engine.update_weights(weights, version=step + 1)
        clock.lap("sync")

        engine_after, judge_after = engine_stats(run)
        engine_did, judge_did = engine_after.since(engine_before), judge_after.since(judge_before)
        metrics = step_metrics(step + 1, groups, samples, spread, engine_did, judge_did, learned, clock)
        folder.log_step(metrics, groups)
        progress.step_done(metrics)
        if (step + 1) % config.checkpoint.every == 0 or step + 1 == config.steps:
            progress.phase("saving")
            checkpoint.save(folder.checkpoints, step + 1, learner, run.checked.tokenizer, config.checkpoint.keep)
    return groups


def engine_stats(run: Run) -> tuple[EngineStats, EngineStats]:
    """Totals of the policy's engine and of the local judge's."""
    return run.table.engine.stats(), run.local.engine.stats() if run.local else EngineStats()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        config, resume, dry_run = parse_arguments(argv)
        checked = check(config)
        if dry_run:
            print(f"{dump_config(config)}\n{checked.plan}")
            return 0
        run, folder = start(checked, resume)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    progress = TrainingProgress(config.steps, run.steps_done, folder.log_line)
    progress.line(f"{folder.path}: {describe(run)}")
    try:
        with progress.live():
            groups = asyncio.run(train(run, folder, progress))
    except BaseException as error:
        print(f"stopped early; go on with: python -m negotiator.train --resume {folder.path}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        raise
    example = best_dialogue(groups)
    if example:
        print(f"\n{render(example)}\n")
    print(f"run folder: {folder.path}")
    return 0


def parse_arguments(argv: Sequence[str] | None) -> tuple[Config, Path | None, bool]:
    """(configuration, run folder to resume, dry run?)."""
    parser = OneSentenceParser(
        prog="python -m negotiator.train",
        description="Trains a language model to negotiate: self-play, LLM judges, GRPO on the dialogue tokens.",
        usage="%(prog)s [--config FILE | --resume RUN] [--section.key VALUE ...] [--dry-run]",
    )
    parser.add_argument("--config", type=Path, default=argparse.SUPPRESS, help="YAML file; presets are in configs/")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="run folder to continue from its newest checkpoint; single settings may be given anew, such as --steps",
    )
    parser.add_argument("--dry-run", action="store_true", help="print resolved config, token and memory plan, and exit")
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    resume: Path | None = getattr(arguments, "resume", None)
    path: Path | None = getattr(arguments, "config", None)
    if resume:
        if path:
            raise ValueError("--resume takes the run's own config.yaml: leave --config out")
        path = resume / "config.yaml"
        if not path.is_file():
            raise ValueError(f"{resume} is not a run folder: it has no config.yaml")
    return load_config(path, config_overrides(arguments)), resume, arguments.dry_run


def start(checked: Checked, resume: Path | None) -> tuple[Run, RunFolder]:
    """Loads the run and opens its folder. Nothing is written before everything is loaded."""
    config = checked.config
    path = resume or config.runs / (config.name or datetime.now().strftime("%Y%m%d-%H%M%S"))
    if resume is None and (path / "config.yaml").exists():
        raise ValueError(f"{path} already holds a run: continue it with --resume {path}, or give another --name")
    newest = checkpoint.newest(path / "checkpoints")
    if newest and newest[0] >= config.steps:
        raise ValueError(f"{path} has already done {newest[0]} steps: give a higher --steps to go on")
    print(f"loading {newest[1] if newest else config.model.path} ...", flush=True)
    run = prepare(checked, newest, path)
    folder = RunFolder(path)
    folder.write_config(dump_config(config))
    folder.forget_after(run.steps_done)
    return run, folder


def describe(run: Run) -> str:
    checked = run.checked
    config = checked.config
    return (
        f"{'resuming after step ' + str(run.steps_done) if run.steps_done else 'starting'}, "
        f"{len(checked.dilemmas)} dilemmas x {len(checked.pairs)} persona pairs, "
        f"{config.rollout.scenarios} scenarios x {config.rollout.group_size} dialogues a step, "
        f"{checked.device} in {str(checked.dtype).removeprefix('torch.')} ({checked.why_dtype}), "
        f"text from {run.table.engine.path}"
    )


if __name__ == "__main__":
    sys.exit(main())
