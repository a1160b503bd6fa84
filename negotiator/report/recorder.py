"""The run folder: config, one metrics object a step, every dialogue, the log.

runs/<name>/config.yaml                 resolved configuration
            metrics.jsonl               one object a step
            evaluations.jsonl           one object an evaluation
            transcripts/step-00001.jsonl   every dialogue of a step; evaluation-00001.jsonl of an evaluation after it
            checkpoints/step-N/         see `checkpoint`
            skipped/step-00001.safetensors   what a step would have learned whose loss or gradient was not finite
            log.txt                     what the terminal showed, without the live display
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from negotiator import parallel
from negotiator.parallel import ALONE, World
from negotiator.types import Dialogue, DialogueGroup, PackedBatch


class RunFolder:
    """Holds the folder's lock while it lives, so that two trainers never write into one run.

    Of a trainer's processes one writes; in the others nothing here does anything.
    """

    def __init__(self, path: Path, world: World = ALONE) -> None:
        """Raises ValueError, in all processes, if another trainer writes there."""
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.skipped = path / "skipped"
        self._writes = world.leads
        if not parallel.from_leader(world, self._writes and self._lock()):
            raise ValueError(f"another trainer is writing to {path}; wait for it or choose another --name")

    def _lock(self) -> bool:
        self.path.mkdir(parents=True, exist_ok=True)
        self._locked = open(self.path / ".lock", "w")  # noqa: SIM115 - the open file is the lock
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def write_config(self, text: str) -> None:
        if self._writes:
            _write_atomically(self.path / "config.yaml", text)

    def forget_after(self, steps_done: int) -> None:
        """Drops the records of steps that the checkpoint at `steps_done` does not contain; they will be run again."""
        for name in ("metrics.jsonl", "evaluations.jsonl"):
            path = self.path / name
            if self._writes and path.exists():
                # A kill in mid-write can leave one torn line, always the last and always after the checkpoint.
                lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
                _write_atomically(path, "".join(line for line in lines if json.loads(line)["step"] <= steps_done))

    def log_step(self, metrics: dict[str, Any], groups: Sequence[DialogueGroup]) -> None:
        if self._writes:
            self._write_transcripts(f"step-{metrics['step']:05d}", groups)
            self._append("metrics.jsonl", metrics)

    def log_evaluation(self, figures: dict[str, Any], groups: Sequence[DialogueGroup]) -> None:
        if self._writes:
            self._write_transcripts(f"evaluation-{figures['step']:05d}", groups)
            self._append("evaluations.jsonl", figures)

    def log_failed(self, step: int, groups: Sequence[DialogueGroup]) -> Path:
        """Of a step that learned nothing, as too many of its dialogues failed."""
        if self._writes:
            self._write_transcripts(f"failed-{step:05d}", groups)
        return self.path / "transcripts" / f"failed-{step:05d}.jsonl"

    def evaluations(self) -> list[dict[str, Any]]:
        """What `log_evaluation` wrote so far."""
        path = self.path / "evaluations.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _write_transcripts(self, name: str, groups: Sequence[DialogueGroup]) -> None:
        folder = self.path / "transcripts"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(_transcript(d), ensure_ascii=False) + "\n" for group in groups for d in group.dialogues]
        _write_atomically(folder / f"{name}.jsonl", "".join(lines))

    def _append(self, name: str, figures: dict[str, Any]) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(_valid(figures), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log_skipped(self, step: int, batches: Sequence[PackedBatch], denominator: float) -> None:
        """Each tensor of each batch as `<number>.<field>`, segments as rows of their four fields."""
        if not self._writes:
            return
        self.skipped.mkdir(exist_ok=True)
        tensors = {}
        for number, batch in enumerate(batches):
            for field in dataclasses.fields(batch):
                value = getattr(batch, field.name)
                if field.name == "segments":
                    value = torch.tensor([dataclasses.astuple(segment) for segment in value])
                tensors[f"{number}.{field.name}"] = torch.as_tensor(value)
        save_file(tensors, self.skipped / f"step-{step:05d}.safetensors", {"denominator": str(denominator)})

    def log_line(self, line: str) -> None:
        if self._writes:
            with open(self.path / "log.txt", "a") as file:
                file.write(line + "\n")


def _valid(metrics: dict[str, Any]) -> dict[str, Any]:
    """What JSON can hold: null for a figure that is not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}


def _transcript(dialogue: Dialogue) -> dict[str, Any]:
    scenario = dialogue.scenario
    return {
        "dilemma": scenario.dilemma.id,
        "pair": scenario.pair_id,
        "agent1": scenario.agent1.name,
        "agent2": scenario.agent2.name,
        "dialogue": dialogue.index,
        "state": dialogue.state,
        "failure": dialogue.failure,
        "rounds": dialogue.rounds,
        "reward": dialogue.reward if dialogue.state != "failed" else None,
        "advantage": dialogue.advantage,
        "utterances": [
            {
                "agent": utterance.agent,
                "text": utterance.text,
                "prompt_tokens": len(utterance.prompt_ids),
                "cached_tokens": utterance.generation.cached_tokens,
                "weight_version": utterance.generation.weight_version,
                "ids": utterance.generation.ids,
                "logprobs": [round(logprob, 5) for logprob in utterance.generation.logprobs],
                "finish_reason": utterance.generation.finish_reason,
            }
            for utterance in dialogue.utterances
        ],
        "agreement": [None if verdict.failure else verdict.probability for verdict in dialogue.verdicts],
        "completion": dialogue.completion,
    }


def _write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
