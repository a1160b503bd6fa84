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
                folder.log_step()          metrics, transcripts, checkpoint; now and then an evaluation

    torchrun --nproc-per-node 4 -m negotiator.train --config configs/quickstart.yaml

Every process negotiates its share of the scenarios; then all have all dialogues, and each learns from its share of the
micro-batches. One of them writes.

Exit codes: 0 all steps are done, 2 a mistake of the user's, 1 any other error. 3: the run pauses, as the judges' budget
is spent or too many dialogues of a step failed; what was learned is saved, and --resume does that step again. 143 after
SIGTERM and 138 after SIGUSR1 (128 + the signal's number), which any of the processes may get: the step is finished and
saved, and --resume goes on; a second one ends the process at once. So a job script sees whether there is more to do
(Slurm's --dependency=afternotok). torchrun hands on SIGTERM, and kills what still runs after 30 s (torch 2.13:
--shutdown-timeout); it hands on SIGUSR1 with --signals-to-handle SIGTERM,SIGINT,SIGUSR1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import io
import itertools
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from negotiator import advantages, checkpoint, guards, parallel, rollout, validation
from negotiator.checkpoint import Checkpoints
from negotiator.config import (
    Config,
    OneSentenceParser,
    add_config_arguments,
    config_overrides,
    dump_config,
    load_config,
)
from negotiator.data import draw_scenarios
from negotiator.endpoint import BudgetSpent
from negotiator.engines.base import EngineStats
from negotiator.guards import StopSignals, Watchdog
from negotiator.loss import default_denominator
from negotiator.packing import pack, turn_samples
from negotiator.parallel import World
from negotiator.plan import MEASURED_MFU, STATED_RATE
from negotiator.report.metrics import Stopwatch, step_metrics
from negotiator.report.progress import TrainingProgress
from negotiator.report.recorder import RunFolder
from negotiator.report.transcript import best_dialogue, render
from negotiator.setup import Checked, Run, check, prepare
from negotiator.types import DialogueGroup, Scenario

PAUSED = 3  # exit code


class Ended(NamedTuple):
    """How a run did: with the dialogues of its last step, all steps done or stopped with an exit code and a reason."""

    groups: list[DialogueGroup]
    code: int = 0
    why: str = ""


class Rollout(NamedTuple):
    """The dialogues of a step, or why there are none."""

    groups: list[DialogueGroup]
    pause: str = ""

    @classmethod
    def gather(cls, world: World, own: Rollout) -> Rollout:
        """Of all processes, for all of them."""
        shares = parallel.gather(world, own)
        groups = sorted(itertools.chain(*(share.groups for share in shares)), key=lambda group: group.scenario.index)
        return cls(groups, next((share.pause for share in shares if share.pause), ""))


async def train(run: Run, folder: RunFolder, progress: TrainingProgress) -> Ended:
    """Runs the remaining steps."""
    checked, config = run.checked, run.checked.config
    saves = Checkpoints(folder.checkpoints, run.learner, checked.tokenizer, checked.dtype, config.checkpoint.keep)
    watchdog = Watchdog(0.9 * config.parallel.timeout_s, f"process {checked.world.rank}")
    try:
        with StopSignals() as signals, watchdog, saves:
            return await _steps(run, folder, progress, saves, signals, watchdog)
    finally:
        for used in (run.table.engine, run.table.agreement, run.table.reward):
            await used.close()


async def _steps(
    run: Run,
    folder: RunFolder,
    progress: TrainingProgress,
    saves: Checkpoints,
    signals: StopSignals,
    watchdog: Watchdog,
) -> Ended:
    config, world, dtype, learner = run.checked.config, run.checked.world, run.checked.dtype, run.learner

    def phase(text: str) -> None:
        progress.phase(text)
        watchdog.moved(text)

    def uttered() -> None:
        progress.utterance()
        watchdog.moved()

    learner.policy.register_forward_pre_hook(lambda *_: watchdog.moved())
    table = dataclasses.replace(run.table, on_utterance=uttered)
    phase("starting the engine")
    weights = run.serve()
    await table.engine.update_weights(weights, version=run.steps_done)
    unchanged: int | None = guards.fingerprint(weights, dtype)  # of the weights until the first update
    generators = [rank for rank, generates in enumerate(parallel.gather(world, run.generates)) if generates]

    async def negotiate(step: int, scenarios: list[Scenario], group_size: int) -> Rollout:
        own = scenarios[generators.index(world.rank) :: len(generators)] if run.generates else []
        try:
            return Rollout(await rollout.run(table, step, own, group_size))
        except BudgetSpent as spent:
            return Rollout([], str(spent))

    def negotiate_step(step: int) -> Coroutine[Any, Any, Rollout]:
        dilemmas, pairs = run.checked.dilemmas, run.checked.pairs
        scenarios = draw_scenarios(dilemmas, pairs, config.seed, step, config.rollout.scenarios)
        return negotiate(step, scenarios, config.rollout.group_size)

    async def evaluate(steps_done: int) -> bool:
        """Whether the policy has never done better."""
        phase("evaluating")
        evaluated = Rollout.gather(
            world, await negotiate(validation.STEP, validation.held_out_scenarios(run.checked), 1)
        )
        await table.engine.update_weights(weights, version=steps_done)  # a resumed run finds its cache empty, too
        figures = validation.validation_metrics(steps_done, evaluated.groups)
        best = validation.is_best(config.evaluation.metric, figures, folder.evaluations())
        folder.log_evaluation(figures, evaluated.groups)
        progress.evaluated(figures, best)
        return parallel.from_leader(world, best)

    groups: list[DialogueGroup] = []
    skipped_in_a_row, ended = 0, Ended(groups)
    ahead: asyncio.Task[Rollout] | None = None  # the dialogues of the next step
    clock = Stopwatch()
    for step in range(run.steps_done, config.steps):
        clock.lap("record")
        engine_before, judge_before = engine_stats(run)

        phase("negotiating")
        if run.local:
            run.local.engine.flush()  # a resumed run finds it empty, so an uninterrupted one must too
            await run.local.judge.warm()
        rolled = Rollout.gather(world, await (ahead or negotiate_step(step)))
        groups = rolled.groups
        if why := rolled.pause or guards.too_many_failed(groups, config.judge.max_failed):
            where = f"; its dialogues: {folder.log_failed(step + 1, groups)}" if groups else ""
            ended = Ended(groups, PAUSED, f"step {step + 1} was not done: {why}{where}")
            if step > run.steps_done and saves.newest_step != step:
                saves.save(step)
            break
        ahead = (
            asyncio.create_task(negotiate_step(step + 1)) if config.rollout.ahead and step + 1 < config.steps else None
        )
        spread = advantages.assign(groups)
        clock.lap("rollout")

        samples = turn_samples(groups, config.loss.train_roles)
        denominator = default_denominator(config.loss.type, [len(sample.response_ids) for sample in samples])
        # Without an advantage, an entropy bonus or a KL term a sample moves nothing; the denominator counts it.
        always = config.loss.entropy_coef > 0 or config.loss.beta > 0
        moving = [s for s in samples if s.advantage != 0 or always]
        batches = pack(moving, config.optimizer.micro_batch_tokens, world.size)
        clock.lap("pack")

        phase("learning")
        if ahead:
            learned = await asyncio.to_thread(learner.step, step, batches, denominator)
        else:
            await table.engine.release()
            learned = learner.step(step, batches, denominator)
        clock.lap("learn")

        phase("sending weights")
        weights = run.serve()
        await table.engine.update_weights(weights, version=step + 1)
        clock.lap("sync")

        engine_after, judge_after = engine_stats(run)
        did = parallel.gather(world, (engine_after.since(engine_before), judge_after.since(judge_before)))
        engine_did, judge_did = map(EngineStats.of_processes, zip(*did, strict=True))
        metrics = step_metrics(step + 1, groups, samples, spread, engine_did, judge_did, learned, clock)
        clock.next_step()
        folder.log_step(metrics, groups)
        progress.step_done(metrics)

        skipped_in_a_row = skipped_in_a_row + 1 if guards.skipped(learned) else 0
        if skipped_in_a_row:
            folder.log_skipped(step + 1, batches, denominator)
            progress.line(
                f"step {step + 1} skipped, as its loss or gradient is not finite; its batches: {folder.skipped}"
            )
            guards.require_patience(skipped_in_a_row, folder.skipped)
        if learned.updated and learned.grad_norm > 0 and unchanged is not None:
            guards.require_agreement(learned.logprob_gap, dtype)
            guards.require_change(unchanged, guards.fingerprint(weights, dtype))
            unchanged = None
        clock.lap("record")

        best = validation.is_due(config, step + 1) and await evaluate(step + 1)
        clock.lap("evaluation")

        last = step + 1 == config.steps
        saves.check()
        signalled = 0 if last else max(parallel.gather(world, signals.caught))
        if (step + 1) % config.checkpoint.every == 0 or last or best or signalled:
            phase("saving")
            saves.save(step + 1, best)
        if signalled:
            ended = Ended(groups, 128 + signalled, f"{signal.Signals(signalled).name}: stopped and saved")
            break
        ended = Ended(groups)
    if ahead:
        ahead.cancel()
    phase("finishing the checkpoint")
    saves.wait()
    return ended


def engine_stats(run: Run) -> tuple[EngineStats, EngineStats]:
    """Totals of the policy's engine and of the local judge's."""
    return run.table.engine.stats(), run.local.engine.stats() if run.local else EngineStats()


def main(argv: Sequence[str] | None = None) -> int:
    try:
        command = parse_arguments(argv)
        config = command.config
        world = parallel.join(config.parallel.timeout_s)
        elsewhere = World(size=command.processes) if command.processes is not None else None
        checked = check(config, elsewhere or world, here=elsewhere is None)
        if command.dry_run and world.leads:
            print(f"{dump_config(config)}\n{checked.plan.text(command.mfu)}", flush=True)
        checked.plan.require_room()
        if command.dry_run:
            return 0
        run, folder = start(checked, command.resume)
    except (ValueError, OSError) as error:
        guards.tell_once(f"error: {error}")
        return 2

    go_on = f"go on with: python -m negotiator.train --resume {folder.path}"
    progress = TrainingProgress(config.steps, run.steps_done, folder.log_line, shown=world.leads)
    progress.line(f"{folder.path}: {describe(run)}")
    try:
        with progress.live():
            ended = asyncio.run(train(run, folder, progress))
    except BaseException as error:
        if not world.leads:
            raise
        print(f"stopped early; {go_on}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        raise
    if world.leads and ended.code:
        progress.line(f"{ended.why}; {go_on}")
    elif world.leads:
        if example := best_dialogue(ended.groups):
            print(f"\n{render(example)}\n")
        print(f"run folder: {folder.path}", flush=True)
    parallel.gather(world, None)  # torchrun ends the others when one leaves with a code that is not 0
    parallel.leave(world)
    return ended.code


class Command(NamedTuple):
    config: Config
    resume: Path | None  # a run folder
    dry_run: bool
    processes: int | None  # of the planned run, on machines that are not at hand
    mfu: float


def parse_arguments(argv: Sequence[str] | None) -> Command:
    parser = OneSentenceParser(
        prog="python -m negotiator.train",
        description="Trains a language model to negotiate: self-play, LLM judges, GRPO on the dialogue tokens.",
        usage="%(prog)s [--config FILE | --resume RUN] [--section.key VALUE ...] "
        "[--dry-run [--processes N] [--mfu SHARE]]",
    )
    parser.add_argument("--config", type=Path, default=argparse.SUPPRESS, help="YAML file; presets are in configs/")
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        default=argparse.SUPPRESS,
        help="run folder to continue from its newest checkpoint; single settings may be given anew, such as --steps",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print resolved config, plan of tokens, arithmetic and memory, and exit"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="dry run: plan for so many, one on each GPU (--model.device cuda) of machines that are not at hand",
    )
    parser.add_argument(
        "--mfu",
        type=float,
        metavar="SHARE",
        default=MEASURED_MFU,
        help=f"dry run: share of {STATED_RATE / 1e12:.0f} bf16 TFLOP/s that the learner reaches (default: %(default)s, "
        "measured on an H200)",
    )
    add_config_arguments(parser)
    first = os.environ.get("RANK", "0") == "0"  # of all processes, which have the same arguments, one speaks
    with contextlib.redirect_stderr(sys.stderr if first else io.StringIO()):
        arguments = parser.parse_args(argv)
        if not arguments.dry_run and (arguments.processes is not None or arguments.mfu != MEASURED_MFU):
            parser.error("--processes and --mfu are for --dry-run; torchrun starts the processes of a run")
        if arguments.mfu <= 0 or (arguments.processes is not None and arguments.processes < 1):
            parser.error("--processes and --mfu have to be positive")
    resume: Path | None = getattr(arguments, "resume", None)
    path: Path | None = getattr(arguments, "config", None)
    if resume:
        if path:
            raise ValueError("--resume takes the run's own config.yaml: leave --config out")
        path = resume / "config.yaml"
        if not path.is_file():
            raise ValueError(f"{resume} is not a run folder: it has no config.yaml")
    config = load_config(path, config_overrides(arguments))
    return Command(config, resume, arguments.dry_run, arguments.processes, arguments.mfu)


def start(checked: Checked, resume: Path | None) -> tuple[Run, RunFolder]:
    """Loads the run and opens its folder. Nothing is written before everything is loaded."""
    config = checked.config
    named = config.name or parallel.from_leader(checked.world, datetime.now().strftime("%Y%m%d-%H%M%S"))
    path = resume or config.runs / named
    if resume is None and (path / "config.yaml").exists():
        raise ValueError(f"{path} already holds a run: continue it with --resume {path}, or give another --name")
    newest = checkpoint.newest(path / "checkpoints")
    if newest and newest[0] >= config.steps:
        raise ValueError(f"{path} has already done {newest[0]} steps: give a higher --steps to go on")
    if checked.world.leads:
        print(f"loading {newest[1] if newest else config.model.path} ...", flush=True)
    run = prepare(checked, newest, path)
    folder = RunFolder(path, checked.world)
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
        f"{checked.world.size} process(es) on {checked.device.type} in {str(checked.dtype).removeprefix('torch.')} "
        f"({checked.why_dtype}), "
        f"text from {run.table.engine.path}; {run.learner.path}"
    )


if __name__ == "__main__":
    sys.exit(main())
