"""Models and tokenizers from local folders, and the device and precision they compute in."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

# transformers draws a bar for every file it loads; the trainer has a display of its own.
transformers_logging.disable_progress_bar()


def choose_device(wanted: Literal["auto", "cpu", "cuda"], number: int = 0) -> torch.device:
    """The CPU, or the GPU of that number."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "model.device is cuda but torch sees no CUDA device: use cpu, or install a CUDA build of torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"process {number} of this machine has no GPU, as there are {torch.cuda.device_count()}: start as many "
            "processes as it has"
        )
    return torch.device("cuda", number)


def choose_dtype(wanted: Literal["auto", "bf16", "fp32"], device: torch.device) -> tuple[torch.dtype, str]:
    """The compute precision and, in a few words, why."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[wanted], "as configured"
    if device.type == "cuda":
        return torch.bfloat16, "the GPU's native precision"
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
        return torch.bfloat16, "this CPU multiplies it natively"
    return torch.float32, "this CPU has no native bf16"


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    _require_model(path)
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def load_model_config(path: Path | str) -> PretrainedConfig:
    _require_model(path)
    config: PretrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True)
    return config


def load_model(path: Path | str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A causal LM in evaluation mode (a trained policy must not differ from the sampled one by dropout)."""
    _require_model(path)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.eval().to(device)
    for parameter in model.parameters():
        # Out of the file's memory map, whose alignment varies: matrix products round by alignment, and a resumed run
        # must repeat an uninterrupted one bit for bit.
        parameter.data = parameter.data.clone()
    return model


def _require_model(path: Path | str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise ValueError(f"no model at {path}: run `make model`, or point model.path to a Hugging Face model folder")
