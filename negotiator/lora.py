# mypy: disable-error-code="import-untyped, import-not-found"
"""LoRA adapters (peft) on a frozen base, which may be held in 4 bits (QLoRA, with bitsandbytes).

The policy that generates is a model of its own with plain weights, into which each version is merged: base + scale B A.
The reference of a KL term is the same model with its adapters left out.

r = rank of the adapters, A [r, inputs], B [outputs, r]
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from negotiator.config import LoRAConfig
from negotiator.models import load_model

ADAPTER = "default"  # peft's name for the one there is


def require_packages(config: LoRAConfig) -> None:
    """Raises ValueError for what is not installed."""
    needed = ["peft"] * bool(config.rank) + ["bitsandbytes", "accelerate"] * config.quantize
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"lora needs {' and '.join(missing)}: pip install 'negotiator[lora]'")


def load_adapted(path: Path | str, device: torch.device, dtype: torch.dtype, config: LoRAConfig) -> PreTrainedModel:
    """The base model, frozen, with adapters that change nothing yet. They are the same in every process of a run."""
    from peft import LoraConfig, inject_adapter_in_model

    model = _load_in_4_bits(path, device, dtype) if config.quantize else load_model(path, device, dtype)
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(0)
        settings = LoraConfig(
            r=config.rank, lora_alpha=config.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        settings.base_model_name_or_path = str(path)
        inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def _load_in_4_bits(path: Path | str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=how, dtype=dtype, device_map={"": device}, local_files_only=True
    )
    model.eval().requires_grad_(False)
    return model


def is_adapted(model: PreTrainedModel) -> bool:
    return bool(_adapted_layers(model))


@dataclass(frozen=True, slots=True)
class MergedTensors:
    """The weights that an adapted model computes with, under the names of its base, in its compute precision.

    Whoever iterates gets them one by one, as they are then.
    """

    model: PreTrainedModel

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        layers = _adapted_layers(self.model)
        for name, parameter in self.model.named_parameters():
            owner = name.partition(".base_layer.")[0]
            if owner not in layers:
                if not parameter.requires_grad:  # else it is an adapter's
                    yield name, parameter.detach()
            elif name.endswith(".weight"):
                yield f"{owner}.weight", _merged(layers[owner])
            else:
                yield name.replace(".base_layer.", "."), parameter.detach()


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The base alone, within the block."""
    layers = _adapted_layers(model).values()
    for layer in layers:
        layer._disable_adapters = True  # peft's own switch also says which parameters have gradients
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """In peft's format: `PeftModel.from_pretrained(base, folder)` reads it."""
    from peft import get_peft_model_state_dict

    untyped: Any = model
    untyped.peft_config[ADAPTER].save_pretrained(folder)
    state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": tensor.contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@torch.no_grad()
def _merged(layer: Any) -> torch.Tensor:
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    base = layer.get_base_layer()
    if getattr(base.weight, "quant_state", None) is None:
        weight = base.weight
    else:
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(base.weight.data, base.weight.quant_state)
    merged: torch.Tensor = (weight.float() + layer.scaling[ADAPTER] * (b.float() @ a.float())).to(a.dtype)
    return merged
