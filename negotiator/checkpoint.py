"""Checkpoints: a Hugging Face folder plus what the trainer needs to go on exactly where it was.

`step-N/` holds the model after N steps as `from_pretrained` reads it, and `trainer.safetensors` with the AdamW moments
and, where the model computes in bf16, the fp32 masters. It appears by one rename, so it is whole or not there. Every
random number of a run is derived from (seed, step, ...), so there is no generator state to keep.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from negotiator.learner import Learner


def save(folder: Path, steps_done: int, learner: Learner, tokenizer: PreTrainedTokenizerBase, keep: int) -> Path:
    """Writes `folder/step-<steps_done>`, then drops all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.partial"):
        shutil.rmtree(stale)
    target = folder / f"step-{steps_done}"
    partial = folder / f"step-{steps_done}.partial"
    learner.model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    save_file(_trainer_tensors(learner), partial / "trainer.safetensors")
    (partial / "trainer.json").write_text(json.dumps({"steps_done": steps_done}) + "\n")
    for file in partial.iterdir():
        _flush(file)
    partial.rename(target)
    _flush(folder)
    for _, old in _all(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> tuple[int, Path] | None:
    """(steps done, path) of the newest whole checkpoint, or None."""
    return _all(folder)[-1] if _all(folder) else None


def load_trainer(path: Path, learner: Learner) -> None:
    """Restores masters and optimizer; the learner's model must have been loaded from `path` itself.

    Raises ValueError if the checkpoint belongs to another model.
    """
    tensors = load_file(path / "trainer.safetensors")
    if not tensors:
        return  # every step so far was without gradients, so AdamW starts afresh, as it would have
    expected = {f"{part}.{name}" for name in learner.masters for part in ("exp_avg", "exp_avg_sq")}
    if not expected <= tensors.keys():
        raise ValueError(f"{path} was saved for another model: it lacks {min(expected - tensors.keys())}")
    for name, master in learner.masters.items():
        with torch.no_grad():
            if f"master.{name}" in tensors:
                master.copy_(tensors[f"master.{name}"])
        learner.optimizer.state[master] = {
            "step": tensors["adam_step"].clone(),
            "exp_avg": tensors[f"exp_avg.{name}"].to(master.device),
            "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(master.device),
        }


def _trainer_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    parameters = dict(learner.model.named_parameters())
    tensors: dict[str, torch.Tensor] = {}
    for name, master in learner.masters.items():
        state = learner.optimizer.state.get(master)
        if state:
            if master is not parameters[name]:
                tensors[f"master.{name}"] = master.detach()
            tensors[f"exp_avg.{name}"] = state["exp_avg"]
            tensors[f"exp_avg_sq.{name}"] = state["exp_avg_sq"]
            tensors["adam_step"] = state["step"]
    return tensors


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))]
    return sorted(found)


def _flush(path: Path) -> None:
    """Makes a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
