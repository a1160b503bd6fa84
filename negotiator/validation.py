"""Evaluation during training: the policy as it is, on dilemmas that are never trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from negotiator.config import Config
from negotiator.data import draw_scenarios
from negotiator.setup import Checked
from negotiator.types import DialogueGroup, Scenario

STEP = -1  # in the seeds of all these dialogues, whatever the training step: each time they differ by the policy alone


def held_out_scenarios(checked: Checked) -> list[Scenario]:
    """The same every time."""
    return draw_scenarios(checked.held_out, checked.pairs, checked.config.seed, 0, checked.config.evaluation.scenarios)


def is_due(config: Config, steps_done: int) -> bool:
    every = config.evaluation.every
    return every > 0 and (steps_done % every == 0 or steps_done == config.steps)


def validation_metrics(steps_done: int, groups: Sequence[DialogueGroup]) -> dict[str, Any]:
    """Means over the dialogues that ended; NaN where none did."""
    dialogues = [dialogue for group in groups for dialogue in group.dialogues]
    ended = [dialogue for dialogue in dialogues if dialogue.state != "failed"]

    def mean(values: Sequence[float]) -> float:
        return fmean(values) if values else float("nan")

    return {
        "step": steps_done,
        "reward": mean([dialogue.reward for dialogue in ended]),
        "agreement": mean([float(dialogue.state == "scored") for dialogue in ended]),
        "rounds": mean([float(dialogue.rounds) for dialogue in ended]),
        "utterance_tokens": mean([float(len(u.generation.ids)) for d in ended for u in d.utterances]),
        "dialogues": len(dialogues),
        "failed": len(dialogues) - len(ended),
    }


def is_best(metric: str, figures: dict[str, Any], earlier: Sequence[dict[str, Any]]) -> bool:
    """Whether its figure is better than all before. Fewer rounds are better, more of everything else."""
    sign = -1 if metric == "rounds" else 1
    before = [sign * other[metric] for other in earlier if other[metric] is not None]
    return not math.isnan(figures[metric]) and sign * figures[metric] > max(before, default=-math.inf)
