"""One attention function for any Hugging Face causal LM, told per forward pass which tokens see which.

    T  tokens in the forward pass, sequences laid end to end without padding
    Hq query heads    Hkv key/value heads (Hq is a multiple)    D head dimension

`use_negotiator_attention(model)` switches a model over; from then on `model(ids[1, T], position_ids=[1, T],
layout=..., use_cache=False)` hands each layer's queries, keys and values to the layout. The trainer passes a
`PackedLayout`, the embedded engine one over its key/value pool. Nothing of this is saved with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, PreTrainedModel

from negotiator.packed_attention import make_plan, packed_attention
from negotiator.types import Segment

NAME = "negotiator"


class Layout(Protocol):
    """Knows which packed tokens attend to which."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one layer: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D]."""
        ...


class PackedLayout:
    """Attention within the segments of a packed batch, each after its prefix; differentiable.

    The segments must tile the batch, each group's after its prefix and side by side (`packing.pack` sees to it).
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._plan = make_plan(segments)

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        if self._plan.device != q.device:
            self._plan = self._plan.to(q.device)  # once a batch; later layers, and their recomputation, find it there
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        return packed_attention(q, k, v, self._plan, scale)[None]


def use_negotiator_attention(model: PreTrainedModel) -> None:
    """Makes `model` compute its attention through the `layout` argument of its forward pass.

    Runs some tokens through the model to see that it does. Raises ValueError for a model that this attention, or logits
    computed as hidden states times the output embedding, would get wrong: sliding windows, attention sinks, soft caps,
    attention dropout in training mode, layers without attention, scaled or biased logits. Does nothing the second time.
    """
    if model.config._attn_implementation == NAME:
        return
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "longrope":
        # Its frequencies depend on the longest position of the pass, so an answer would on who is computed beside it.
        raise ValueError("rotary embeddings of type longrope are not supported; choose another model")
    AttentionInterface.register(NAME, _attention)
    model.set_attn_implementation(NAME)
    untyped: Any = model
    seen, decoder, head = _SeenLayers(), untyped.get_decoder(), untyped.get_output_embeddings()
    tokens = torch.arange(8, device=model.device)[None]
    with torch.no_grad():
        hidden = decoder(tokens, position_ids=tokens, layout=seen, use_cache=False).last_hidden_state
        logits = model(tokens, position_ids=tokens, layout=_SeenLayers(), use_cache=False).logits
        plain = F.linear(hidden, head.weight)
        agree = (logits - plain).abs().max() <= 1e-3 * plain.abs().max()
    if seen.layers != list(range(model.config.num_hidden_layers)):
        raise ValueError(f"{type(model).__name__} has layers without causal attention; choose another model")
    if getattr(head, "bias", None) is not None or not agree:
        raise ValueError(f"{type(model).__name__} scales, caps or shifts its logits; choose another model")


class _SeenLayers:
    """A layout in which each token attends to itself alone: the output is its value."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        self.layers.append(layer)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).transpose(1, 2).contiguous()


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every attention layer; it passes the model's own keyword arguments through."""
    if layout is None:
        raise ValueError(
            "this model's attention needs layout=...; without one, call its set_attn_implementation('sdpa') first"
        )
    names = ("sliding_window", "softcap", "s_aux", "position_bias")  # as transformers calls them; s_aux are sinks
    unsupported = [name for name in names if kwargs.get(name) is not None]
    if unsupported or not getattr(module, "is_causal", True):
        what = ", ".join(unsupported) or "attention that is not causal"
        raise ValueError(f"this model's attention uses {what}, which is not supported; choose another model")
    if dropout:
        raise ValueError("attention dropout is not supported; set attention_dropout to 0 in the model's config.json")
    if attention_mask is not None:
        raise ValueError("pass layout=... alone: an attention_mask beside it would be ignored")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return layout.attend(module.layer_idx, query, key, value, scale), None
