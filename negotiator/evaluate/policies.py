# mypy: disable-error-code="import-untyped"
"""The two policies under evaluation: which folder a path means, what is in it, and its weights in memory."""

from __future__ import annotations

import gc
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from negotiator import checkpoint
from negotiator.models import load_model

Side = Literal["A", "B"]
SIDES: tuple[Side, Side] = ("A", "B")
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file of weights


@dataclass(frozen=True, slots=True)
class Policy:
    side: Side
    label: str
    folder: Path
    base: Path | None  # of adapters; None for a whole model
    tokenizer: PreTrainedTokenizerBase  # of its own folder


def find_policy(path: Path, side: Side) -> Policy:
    """A Hugging Face folder, a checkpoint of ours, a folder of adapters, or a run, which means its newest checkpoint.

    Raises ValueError for anything else.
    """
    folder = path
    if (path / "checkpoints").is_dir():
        newest = checkpoint.newest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"the run {path} has no whole checkpoint yet")
        folder = newest[1]
    adapters = folder / "adapter_config.json"
    if adapters.is_file():
        base = Path(json.loads(adapters.read_text())["base_model_name_or_path"])
        if not (base / "config.json").is_file():
            raise ValueError(f"the base of the adapters in {folder} is not at {base}: run this where that path leads")
        return Policy(side, _label(folder), folder, base, _tokenizer(folder))
    if not (folder / "config.json").is_file():
        raise ValueError(f"no model at {path}: name a model folder, a checkpoint, or a run of negotiator.train")
    return Policy(side, _label(folder), folder, None, _tokenizer(folder))


def load_policy(policy: Policy, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """In plain weights, frozen; adapters are added to their base."""
    if policy.base is None:
        whole: PreTrainedModel = load_model(policy.folder, device, dtype).requires_grad_(False)
        return whole
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load_model(policy.base, device, dtype), str(policy.folder))
    merged: Any = adapted.merge_and_unload()
    model: PreTrainedModel = merged.eval().requires_grad_(False)
    return model


def free_memory(device: torch.device) -> None:
    """Of a policy that nothing refers to any more, before the next one is loaded."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def fingerprint(policy: Policy) -> str:
    """Of the weights: size and samples of each file, as reading all of a large model takes minutes.

    A training step changes every tensor, so it changes the samples.
    """
    digest = hashlib.blake2b(digest_size=16)
    for folder in filter(None, (policy.base, policy.folder)):
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            size = file.stat().st_size
            digest.update(f"{file.name} {size} ".encode())
            with open(file, "rb") as opened:
                for number in range(SAMPLES):
                    opened.seek(max(0, size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                    digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return tokenizer


def _label(folder: Path) -> str:
    """`x-step-N` for runs/x/checkpoints/step-N, else the folder's name."""
    folder = folder.resolve()
    name = f"{folder.parent.parent.name}-{folder.name}" if folder.parent.name == "checkpoints" else folder.name
    return re.sub(r"[^\w.+-]", "_", name)
