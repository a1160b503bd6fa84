"""The run folder: config, one metrics object a step, every dialogue, the log.

runs/<name>/config.yaml                 resolved configuration
            metrics.jsonl               one object a step
            transcripts/step-00001.jsonl   every dialogue of a step
            checkpoints/step-N/         see `checkpoint`
            log.txt                     what the terminal showed, without the live display
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from negotiator.types import Dialogue, DialogueGroup


class RunFolder:
    """Holds the folder's lock while it lives, so that two trainers never write into one run."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = open(path / ".lock", "w")  # noqa: SIM115 - the open file is the lock
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another trainer is writing to {path}; wait for it or choose another --name") from None

    def write_config(self, text: str) -> None:
        _write_atomically(self.path / "config.yaml", text)

    def forget_after(self, steps_done: int) -> None:
        """Drops the records of steps that the checkpoint at `steps_done` does not contain; they will be run again."""
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            # A kill in mid-write can leave one torn line, always the last and always after the checkpoint.
            kept = metrics.read_text().splitlines(keepends=True)[:steps_done]
            _write_atomically(metrics, "".join(kept))

    def log_step(self, metrics: dict[str, Any], groups: Sequence[DialogueGroup]) -> None:
        folder = self.path / "transcripts"
        folder.mkdir(exist_ok=True)
        lines = [json.dumps(_transcript(d), ensure_ascii=False) + "\n" for group in groups for d in group.dialogues]
        _write_atomically(folder / f"step-{metrics['step']:05d}.jsonl", "".join(lines))
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def log_line(self, line: str) -> None:
        with open(self.path / "log.txt", "a") as file:
            file.write(line + "\n")


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
