"""Compares two policies: they negotiate 100 conflicts and answer 100 open questions, and a judge compares them.

    python -m negotiator.evaluate --policy runs/x --against models/SmolLM2-135M-Instruct --config runs/x/config.yaml

A policy is a model folder, a checkpoint, a folder of adapters, or a run, which means its newest checkpoint. Both
negotiate with themselves, whatever `mode` they were trained in, greedy and sampled, in this process. The configuration
is the trainer's: dialogue, engine, judge, seed; `model.path` is the local judge.

Everything is kept item by item in the output folder, and the same command goes on where it was stopped:

    report.md, results.json                 the figures
    transcripts.jsonl, transcripts.html     all texts side by side
    settings.json, *.jsonl                  see `evaluate.records`

Exit codes: 0 done, 2 a mistake of the user's, 1 any other error, 130 after Ctrl-C.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from negotiator.config import Config, OneSentenceParser, add_config_arguments, config_overrides, load_config
from negotiator.endpoint.records import BudgetSpent
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.evaluate import general, transcripts
from negotiator.evaluate.compare import compare, uncompared
from negotiator.evaluate.play import Items, load_items, play, require_room, unplayed
from negotiator.evaluate.policies import Policy, find_policy, fingerprint, free_memory
from negotiator.evaluate.records import EvaluationFolder, write_atomically
from negotiator.evaluate.report import markdown
from negotiator.evaluate.summary import as_json, summarize
from negotiator.judges import LocalJudge, make_judges, make_pair_judge
from negotiator.models import choose_device, choose_dtype, load_model, load_tokenizer
from negotiator.prompts.templates import Templates

# Of the judge's settings those that decide verdicts; the others say how an endpoint is reached and paid.
DECIDING = {"agreement", "reward", "evaluation", "agree_threshold", "url", "name", "agreement_name", "reward_name"}
DECIDING |= {"evaluation_name", "temperature", "votes", "vote"}


@dataclass(frozen=True, slots=True)
class Command:
    config: Config
    policies: tuple[Policy, Policy]
    out: Path
    first: int | None  # of the items
    tasks: list[str]  # of lm-evaluation-harness
    text: str  # as it was typed


def main(argv: Sequence[str] | None = None) -> int:
    try:
        command = parse_arguments(sys.argv[1:] if argv is None else argv)
        config, items = command.config, load_items(command.first)
        device = choose_device(config.model.device)
        dtype, why = choose_dtype(config.model.dtype, device)
        for policy in command.policies:
            require_room(policy, items, config)
        folder = EvaluationFolder(command.out, settings(command))
        abilities = general.unmeasured(command.policies, command.tasks, command.first, folder.abilities)
        tasks = general.read_tasks(command.tasks) if abilities else None
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    place = device, dtype
    print(f"{folder.path}: on {device.type} in {str(dtype).removeprefix('torch.')} ({why})", flush=True)
    try:
        asyncio.run(evaluate(command, items, folder, place))
        if abilities:
            general.measure(abilities, tasks, command.first, place, folder.abilities)
    except (KeyboardInterrupt, BudgetSpent) as stop:
        print(f"{stop or 'interrupted'}; the same command goes on, with what is in {folder.path}", file=sys.stderr)
        return 1 if isinstance(stop, BudgetSpent) else 130
    print(f"\n{write_report(command, items, folder)}\n{folder.path / 'transcripts.html'}", flush=True)
    return 0


async def evaluate(
    command: Command, items: Items, folder: EvaluationFolder, place: tuple[torch.device, torch.dtype]
) -> None:
    """Has all texts written, one policy after the other, and then compared."""
    config = command.config
    tasks = [(policy, unplayed(policy, items, folder.texts)) for policy in command.policies]
    if not any(own for _, own in tasks) and not uncompared(items, folder.texts, folder.comparisons):
        return
    judge, store = config.judge, folder.path / "judge.sqlite"
    local = local_judge(config, place) if "local" in (judge.agreement, judge.reward, judge.evaluation) else None
    agreement, reward = make_judges(judge, local, store)
    pair_judge = make_pair_judge(judge, local, store)
    try:
        if local:
            await local.warm()
        for policy, own in tasks:
            if own:
                await play(policy, own, config, place, (agreement, reward), folder.texts)
                free_memory(place[0])
        pairs = uncompared(items, folder.texts, folder.comparisons)
        if pairs:
            at_once = max(config.engine.max_running, judge.concurrency)
            await compare(pairs, pair_judge, at_once, folder.comparisons)
    finally:
        for used in (agreement, reward, pair_judge):
            await used.close()


def local_judge(config: Config, place: tuple[torch.device, torch.dtype]) -> LocalJudge:
    """The frozen model of the configuration, as in training."""
    engine = EmbeddedEngine(load_model(config.model.path, *place).requires_grad_(False), config.engine)
    return LocalJudge(engine, Templates(load_tokenizer(config.model.path)), config.judge.agree_threshold)


def write_report(command: Command, items: Items, folder: EvaluationFolder) -> str:
    """Returns the Markdown."""
    abilities = [a for a in folder.abilities.records.values() if a.limit == command.first and a.task in command.tasks]
    texts, comparisons = folder.texts.records, folder.comparisons.records
    summary = summarize(items, [*texts.values()], [*comparisons.values()], abilities, command.config.seed)
    page = markdown(summary, command.policies, judges(command.config), command.text)
    about = {policy.side: {"label": policy.label, "folder": str(policy.folder)} for policy in command.policies}
    figures = {"command": command.text, "policies": about, "settings": settings(command), **as_json(summary)}
    write_atomically(folder.path / "report.md", page)
    write_atomically(folder.path / "results.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    found = [*transcripts.rows(items, texts, comparisons)]
    write_atomically(folder.path / "transcripts.jsonl", transcripts.as_jsonl(found))
    labels = {policy.side: policy.label for policy in command.policies}
    write_atomically(folder.path / "transcripts.html", transcripts.as_html(found, labels))
    return page


def settings(command: Command) -> dict[str, Any]:
    """What decides the results; how many items are done, and how endpoints are reached, does not."""
    dumped = command.config.model_dump(mode="json")
    return {
        "policies": {policy.side: fingerprint(policy) for policy in command.policies},
        "model": dumped["model"],
        "dialogue": dumped["dialogue"],
        "judge": {name: value for name, value in dumped["judge"].items() if name in DECIDING},
        "seed": dumped["seed"],
    }


def judges(config: Config) -> str:
    """Who judged, in a sentence or two."""
    judge = config.judge

    def who(role: str) -> str:
        kind: str = getattr(judge, role)
        if kind == "openai":
            return f"{getattr(judge, f'{role}_name') or judge.name} at {judge.url}"
        return f"the local model {config.model.path}" if kind == "local" else kind

    said = (
        f"Agreement is judged by {who('agreement')}, scores are by {who('reward')}, comparisons by {who('evaluation')}."
    )
    if who("evaluation") == who("reward"):
        said += " So the comparing judge is not held out from the rewards."
    return said


def parse_arguments(argv: Sequence[str]) -> Command:
    parser = OneSentenceParser(
        prog="python -m negotiator.evaluate",
        description="Compares two policies on 100 conflicts and 100 open questions, greedy and sampled.",
        usage="%(prog)s --policy A --against B [--config FILE] [--out FOLDER] [--items N] [--general TASK,...] "
        "[--section.key VALUE ...]",
    )
    a_policy = "model folder, checkpoint, folder of adapters, or a run, which means its newest checkpoint"
    parser.add_argument("--policy", type=Path, required=True, metavar="A", help=a_policy)
    parser.add_argument("--against", type=Path, required=True, metavar="B", help="likewise")
    parser.add_argument("--config", type=Path, help="YAML file, such as the config.yaml of a run")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/evaluation-A-B)")
    parser.add_argument("--items", type=int, metavar="N", help="only the first N of each set, for a quick look")
    parser.add_argument(
        "--general", default="", metavar="TASK,...", help="tasks of lm-evaluation-harness, such as ifeval,aime24"
    )
    add_config_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.items is not None and arguments.items < 1:
        parser.error("--items must be at least 1")
    config = load_config(arguments.config, config_overrides(arguments))
    a, b = find_policy(arguments.policy, "A"), find_policy(arguments.against, "B")
    return Command(
        config=config,
        policies=(a, b),
        out=arguments.out or config.runs / f"evaluation-{a.label}-{b.label}",
        first=arguments.items,
        tasks=[name.strip() for name in arguments.general.split(",") if name.strip()],
        text=f"python -m negotiator.evaluate {shlex.join(argv)}",
    )


if __name__ == "__main__":
    sys.exit(main())
