"""One step as one flat object of figures; the names are the columns of `metrics.jsonl`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from negotiator.advantages import AdvantageStats
from negotiator.engines.base import EngineStats
from negotiator.guards import skipped
from negotiator.learner import LearnerStats
from negotiator.types import DialogueGroup, TurnSample


class Stopwatch:
    """Seconds by phase of a step; every moment since it was made belongs to exactly one lap of one step."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def next_step(self) -> None:
        """A step begins where the last lap ended."""
        self._started, self.seconds = self._last, {}

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def total(self) -> float:
        return self._last - self._started


def step_metrics(
    step: int,
    groups: Sequence[DialogueGroup],
    samples: Sequence[TurnSample],
    spread: AdvantageStats,
    engine: EngineStats,
    judge: EngineStats,
    stats: LearnerStats,
    clock: Stopwatch,
) -> dict[str, Any]:
    """`samples` are all of the step, those that a zero advantage kept from the learner too.

    `engine` and `judge` are what the two engines did in this step; the local judge's forward passes are taken out of
    the rollout's seconds. `record` and `evaluation` are what the step before did too late for its own line: writing
    that line and the transcripts, checks, what a checkpoint keeps the trainer waiting for; and an evaluation. Rates and
    means are over the dialogues that ended.
    """
    dialogues = [dialogue for group in groups for dialogue in group.dialogues]
    ended = [dialogue for dialogue in dialogues if dialogue.state != "failed"]
    judge_seconds = judge.prefill_seconds + judge.decode_seconds
    seconds = {
        "step": clock.total(),
        "rollout": clock.seconds["rollout"] - judge_seconds,
        "judge": judge_seconds,
        "pack": clock.seconds["pack"],
        "forward": stats.forward_seconds,
        "loss": stats.loss_seconds,
        "backward": stats.backward_seconds,
        "optimizer": stats.optimizer_seconds,
        "sync": clock.seconds["sync"],
        "record": clock.seconds["record"],
        "evaluation": clock.seconds.get("evaluation", 0.0),  # not in the first step of a run
    }
    return {
        "step": step,
        "reward_mean": spread.reward_mean,
        "reward_std": spread.reward_std,
        "reward_min": spread.reward_min,
        "reward_max": spread.reward_max,
        "agreement_rate": sum(d.state == "scored" for d in ended) / len(ended),
        "rounds_mean": sum(d.rounds for d in ended) / len(ended),
        "zero_variance_groups": spread.zero_variance_groups,
        "failed_dialogues": len(dialogues) - len(ended),
        "trained_tokens": sum(len(sample.response_ids) for sample in samples),
        "generated_tokens": engine.generated_tokens,
        "prompt_tokens": engine.prompt_tokens,
        "cached_prompt_tokens": engine.cached_prompt_tokens,
        "cached_fraction_of_ideal": engine.cached_fraction_of_ideal,
        "utterance_tokens_mean": sum(len(s.response_ids) for s in samples) / len(samples),
        "skipped": skipped(stats),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": stats.learning_rate,
        "logprob_gap": stats.logprob_gap,
        "entropy": stats.entropy,
        "approx_kl": stats.approx_kl,
        "clip_fraction": stats.clip_fraction,
        "reference_kl": stats.reference_kl,
        "computed_tokens": stats.computed_tokens,
        "logical_tokens": stats.logical_tokens,
        "tokens_per_s": engine.generated_tokens / clock.total(),
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
    }
