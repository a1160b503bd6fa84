# mypy: disable-error-code="import-untyped"
"""Liger's Triton kernels (RMSNorm, rotary embedding, SwiGLU) for what stands between a layer's matrix products."""

from __future__ import annotations

import importlib.util
from typing import Literal

from transformers import PreTrainedModel

from negotiator_kernels.availability import triton_off_reason


def use_liger(model: PreTrainedModel, wanted: Literal["auto", "on", "off"]) -> str:
    """Puts them into `model` where they are wanted and possible, and says in a few words what was done and why.

    Liger replaces them in transformers itself: models of the same kind that this process makes later have them, too,
    and all have its rotary embedding. Raises ValueError where they are wanted by "on" and impossible.
    """
    if wanted == "off":
        return "layers as transformers computes them"
    reason = liger_off_reason(model)
    if reason is None:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        return "layers with Liger's kernels"
    if wanted == "on":
        raise ValueError(f"optimizer.liger is on, but {reason}")
    return f"layers as transformers computes them: {reason}"


def liger_off_reason(model: PreTrainedModel) -> str | None:
    """Why Liger's kernels are not for this model here; None if they are."""
    if model.device.type != "cuda":
        return f"Liger's kernels need a GPU, and the model is on {model.device.type}"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed (pip install 'negotiator[liger]')"
    if (reason := triton_off_reason()) is not None:
        return reason
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    return None if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"Liger has no kernels for {kind}"
