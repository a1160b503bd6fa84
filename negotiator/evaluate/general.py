# mypy: disable-error-code="import-untyped, import-not-found"
"""General abilities, by the tasks of lm-evaluation-harness (the extra negotiator[general])."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import negotiator.data
from negotiator.evaluate.policies import Policy, free_memory, load_policy
from negotiator.evaluate.records import Ability, Journal

BATCH = 8  # its automatic choice tries until memory runs out, which on a CPU takes the machine along
ALIASES = {"gpqa_diamond": "gpqa_diamond_zeroshot"}  # the harness has no task of the plain name
TINY = Path(negotiator.data.__file__).parent / "tiny_task"


def read_tasks(names: Sequence[str]) -> Any:
    """The harness' TaskManager. Raises ValueError if it is not installed or does not have a task."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("--general needs lm-evaluation-harness: pip install 'negotiator[general]'")
    from lm_eval.tasks import TaskManager

    print("reading the tasks of lm-evaluation-harness, which takes most of a minute", flush=True)
    wanted = {ALIASES.get(name, name) for name in names} - {TINY.name}
    manager = TaskManager(include_defaults=bool(wanted))
    for name in wanted:
        if name not in manager.all_tasks:
            alike = [known for known in manager.all_tasks if known.startswith(name[:6])][:5]
            raise ValueError(f"lm-evaluation-harness has no task {name}; alike are {', '.join(alike) or 'none'}")
    return manager


def unmeasured(
    policies: Sequence[Policy], names: Sequence[str], limit: int | None, abilities: Journal[Ability]
) -> list[tuple[Policy, list[str]]]:
    """For each policy the tasks that it has still to do."""
    left = [(p, [name for name in names if (p.side, name, limit) not in abilities.records]) for p in policies]
    return [(policy, own) for policy, own in left if own]


def measure(
    work: Sequence[tuple[Policy, list[str]]],
    tasks: Any,
    limit: int | None,
    place: tuple[torch.device, torch.dtype],
    abilities: Journal[Ability],
) -> None:
    """`tasks`: of `read_tasks`. `limit`: only the first so many items of each. Each is kept as soon as it is done."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    for policy, names in work:
        print(f"loading {policy.folder} ...", flush=True)
        model = HFLM(
            pretrained=load_policy(policy, *place),
            tokenizer=policy.tokenizer,
            batch_size=BATCH,
            enable_thinking=False,
        )
        for name in names:
            print(f"{policy.side} ({policy.label}): {name}", flush=True)
            found = simple_evaluate(
                model,
                tasks=[_tiny_task() if name == TINY.name else ALIASES.get(name, name)],
                task_manager=tasks,
                limit=limit,
                apply_chat_template=True,
                log_samples=False,
            )
            items = sum(samples["effective"] for samples in found["n-samples"].values())
            abilities.add(Ability(policy.side, name, limit, figures(found["results"]), items))
        del model
        free_memory(place[0])


def figures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the harness found, by metric; a group of tasks has a row for each, which then heads the metric's name.

    The harness calls metrics "acc,none" or "exact_match,flexible-extract", after the filter of answers.
    """
    found = {}
    for row, metrics in results.items():
        for name, value in metrics.items():
            metric, comma, choice = name.partition(",")
            if comma and isinstance(value, int | float):
                label = metric if choice == "none" else f"{metric} {choice}"
                found[label if len(results) == 1 else f"{row} {label}"] = float(value)
    return found


def _tiny_task() -> dict[str, Any]:
    task: dict[str, Any] = yaml.safe_load((TINY / "tiny_task.yaml").read_text())
    return {**task, "dataset_kwargs": {"data_files": {"test": str(TINY / "tiny_task.jsonl")}}}
