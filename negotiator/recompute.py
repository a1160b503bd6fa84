"""Activation checkpointing: what the backward pass computes again instead of keeping it."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from negotiator.parallel import decoder_layers
from negotiator_kernels.availability import native_off_reason


def recompute(model: PreTrainedModel, what: Literal["none", "selective", "full"]) -> None:
    """Makes each layer of `model` compute parts of its activations again in the backward pass instead of keeping them.

    `selective` keeps the results of matrix products and of attention, and computes again what is cheap; `full` keeps a
    layer's input alone.
    """
    if what == "none":
        return
    more: dict[str, Any] = {}
    if what == "selective":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _kept_operators())
    for layer in decoder_layers(model):
        # No layer draws random numbers (`use_negotiator_attention` refuses dropout), so no state of them is restored.
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **more
        )


def _kept_operators() -> list[Any]:
    aten = torch.ops.aten
    ours = [torch.ops.negotiator_kernels.packed_attention.default] if native_off_reason() is None else []
    return [
        *ours,
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._flash_attention_forward.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
    ]
