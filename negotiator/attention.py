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

from negotiator.types import Segment

NAME = "negotiator"


class Layout(Protocol):
    """Knows which packed tokens attend to which."""

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one layer: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D]."""
        ...


class PackedLayout:
    """Attention within the segments of a packed batch, each after its prefix; differentiable.

    The segments must tile the batch in order, and every prefix must be one of them (`packing.pack` sees to both).
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        starts = {s.start: i for i, s in enumerate(segments)}
        expected = 0
        self._sizes: list[int] = []
        self._prefixes: list[int | None] = []  # the segment that is this segment's prefix
        for s in segments:
            assert s.start == expected < s.end, f"segment {s} does not start where the one before it ends"
            expected = s.end
            prefix = None
            if s.prefix_end > s.prefix_start:
                prefix = starts.get(s.prefix_start)
                assert prefix is not None, f"the prefix of {s} is no segment"
                assert segments[prefix].end == s.prefix_end, f"the prefix of {s} is not a whole segment"
            self._sizes.append(s.end - s.start)
            self._prefixes.append(prefix)
        self._masks: dict[tuple[int, int], torch.Tensor] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        repeats = q.shape[1] // k.shape[1]
        # Split, not sliced: the backward of a slice fills a tensor of all T tokens, once per segment.
        queries = torch.split(q, self._sizes, dim=2)
        keys = torch.split(k.repeat_interleave(repeats, dim=1), self._sizes, dim=2)
        values = torch.split(v.repeat_interleave(repeats, dim=1), self._sizes, dim=2)
        outputs = []
        for query, key, value, prefix in zip(queries, keys, values, self._prefixes, strict=True):
            if prefix is None:
                output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
            else:
                key = torch.cat((keys[prefix], key), dim=2)
                value = torch.cat((values[prefix], value), dim=2)
                mask = self._lower_right(query.shape[2], key.shape[2], q.device)
                output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
            outputs.append(output)
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()

    def _lower_right(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """Mask [rows, columns] of a causal attention whose last query sees the last key; kept for the next layers."""
        if (rows, columns) not in self._masks:
            mask = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows)
            self._masks[rows, columns] = mask
        return self._masks[rows, columns]


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
