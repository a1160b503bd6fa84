"""The native norms, rotations and gates of `negotiator_kernels.layers` in a model that trains on the CPU in fp32.

T  tokens    H  heads    d  head dimension
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from negotiator_kernels.availability import native_off_reason
from negotiator_kernels.layers import rms_norm, rotary, swiglu

TOLERANCE = 1e-4  # between a layer's own results and native ones, relative to the largest; another formula is far off
ROTARY = "apply_rotary_pos_emb"  # the function's name in each of transformers' models


def use_native_layers(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Puts them into `model`, which is to compute in `dtype`, and says in a few words what was done or why nothing.

    A layer is replaced only if some tokens, run through it, show that it computes just what the native one does. Other
    models, and what is saved, stay as they are; copies of the model have the native layers, too.
    """
    if (reason := native_layers_off_reason(model, dtype)) is not None:
        return f"layers as transformers computes them: {reason}"
    kinds: dict[str, list[tuple[nn.Module, Callable[..., Any]]]] = {
        "norms": [(module, _norm) for module in model.modules() if _is_norm(module)],
        "rotations": [*_rotating(model)],
        "gates": [(module, _gated) for module in model.modules() if _is_gated(module)],
    }
    for module, forward in itertools.chain(*kinds.values()):
        _use(module, forward)
    found = ", ".join(f"{len(replaced)} {what}" for what, replaced in kinds.items())
    return f"layers with native kernels ({found})"


def native_layers_off_reason(model: PreTrainedModel, dtype: torch.dtype) -> str | None:
    """Why native layers are not for this model here; None if they are."""
    if model.device.type != "cpu":
        return f"native ones are for the CPU, and the model is on {model.device.type}"
    if dtype != torch.float32:
        return f"native ones compute in fp32, and the model in {str(dtype).removeprefix('torch.')}"
    return native_off_reason()


def _use(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = MethodType(forward, module)  # not a closure: a deep copy of the module gets its own


def _norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))
    return out


def _is_norm(module: nn.Module) -> bool:
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    if [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    norm: Any = module
    weight = _noise(*norm.weight.shape) + 0.5
    # Rows of which some are so small that epsilon counts.
    x = _noise(4, len(weight)) * torch.tensor([[1e-3], [1e-2], [1.0], [30.0]])
    own = torch.func.functional_call(module, {"weight": weight}, (x,))
    return all(map(_agree, own, rms_norm(x, weight, norm.variance_epsilon)))


def _is_gated(module: nn.Module) -> bool:
    names = {name for name, _ in module.named_children()}
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    projection: Any = module.gate_proj
    x = 3 * _noise(4, projection.in_features)
    with torch.no_grad():
        return _agree(type(module).forward(module, x), _gated(module, x))


def _rotating(model: PreTrainedModel) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The attention layers that rotate queries and keys as `rotary` does, and their forward pass with that."""
    decoder: Any = model.get_decoder()
    embedding = getattr(decoder, "rotary_emb", None)
    if embedding is None:
        return
    positions = torch.arange(5)[None]
    width = embedding(torch.empty(1, 5, 1), positions)[0].shape[-1]
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        theirs = forward.__globals__.get(ROTARY)
        if ROTARY not in forward.__code__.co_names or theirs is None or getattr(module, "head_dim", None) != width:
            continue
        # Halves of cos and sin that differ, unlike those of a real embedding, tell apart who uses which.
        (q, k), (cos, sin) = _noise(2, 1, 2, 5, width), _noise(2, 1, 5, width)
        if all(map(_agree, theirs(q, k, cos, sin), rotary(q, k, cos, sin))):
            # Transformers looks the function up in the file of the module's class, which is other models' file, too.
            names = {**forward.__globals__, ROTARY: rotary}
            native = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            native.__kwdefaults__ = forward.__kwdefaults__
            yield module, native


def add_embedding_gradients_in_place(model: PreTrainedModel) -> None:
    """Makes backward() add the gradients of embedded tokens to the weight's `grad` row by row.

    For a whole weight in fp32 that is the output embedding, too: on its way through autograd the gradient of a few
    rows would be a second tensor of the weight's size, mostly zeros, filled and added each time. `torch.autograd.grad`
    does not see it. Other models stay as they are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is nn.Embedding and head is not None and head.weight is embedding.weight:
        _use(embedding, _embedded)


def _embedded(self: Any, ids: torch.Tensor) -> torch.Tensor:
    weight = self.weight
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.embedding(ids, weight)
    rows = F.embedding(ids, weight.detach()).requires_grad_()

    def add(gradient: torch.Tensor) -> None:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        learned = torch.ones_like(ids, dtype=torch.bool) if self.padding_idx is None else ids != self.padding_idx
        weight.grad.index_add_(0, ids[learned], gradient[learned])

    rows.register_hook(add)
    return rows


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return bool((theirs - ours).abs().max() <= TOLERANCE * theirs.abs().max())
