"""The embedded engine's fast path on a CPU: all layers of a Llama, Qwen2 or Qwen3 in one native call.

Its weights are repacked so that a product of few rows reads them in one stream; that takes a copy of them, made anew
after each update. Activations are fp32 whatever the weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from negotiator.engines.forward import Span
from negotiator.engines.kv_cache import KVCache, PagedLayout
from negotiator_kernels.availability import native_off_reason
from negotiator_kernels.decoder import DecoderWeights, LayerWeights, decode

FAMILIES = (LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)


def native_forward_off_reason(model: PreTrainedModel) -> str | None:
    """Why this model does not take the fast path here; None if it does."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if (reason := native_off_reason()) is not None:
        return reason
    if type(model) not in FAMILIES:
        return f"{type(model).__name__} is none of {', '.join(family.__name__ for family in FAMILIES)}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {model.dtype}"
    config: Any = model.config
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    if config.hidden_size % 2 or config.intermediate_size % 2:
        return "its sizes are odd"
    for name, module in model.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return f"{name} is no plain linear layer"
        if name.endswith(("o_proj", "gate_proj", "up_proj", "down_proj")) and module.bias is not None:
            return f"{name} has a bias"
    return None


class NativeForward:
    """See `engines.forward.Forward`."""

    def __init__(self, model: PreTrainedModel, cache: KVCache) -> None:
        assert native_forward_off_reason(model) is None
        self._model: Any = model
        self._cache = cache
        self._weights: DecoderWeights | None = None

    @torch.no_grad()
    def __call__(self, spans: Sequence[Span], rows: Sequence[int]) -> torch.Tensor:
        if self._weights is None:
            self._weights = pack_weights(self._model)
        decoder = self._model.get_decoder()
        ids = torch.tensor([token for span in spans for token in span.tokens])
        positions = torch.tensor([position for span in spans for position in range(span.start, span.end)])
        hidden = decoder.embed_tokens(ids).float()
        cos, sin = decoder.rotary_emb(hidden, positions[None])
        layout = PagedLayout.build(self._cache, [(span.reservation, span.start, span.end) for span in spans])
        return decode(
            hidden,
            cos[0],
            sin[0],
            self._cache.keys,
            self._cache.values,
            layout.new_slots,
            layout.slots,
            layout.slot_starts,
            layout.query_starts,
            torch.tensor(rows, dtype=torch.int64),
            self._weights,
        )

    def weights_changed(self) -> None:
        self._weights = None


def pack_weights(model: PreTrainedModel) -> DecoderWeights:
    """Copies the weights of a model that takes the fast path, in the model's dtype."""
    untyped: Any = model
    decoder, config = untyped.get_decoder(), untyped.config
    attention = decoder.layers[0].self_attn
    return DecoderWeights(
        layers=[
            LayerWeights.pack(
                input_norm=layer.input_layernorm.weight,
                qkv=[getattr(layer.self_attn, name).weight for name in ("q_proj", "k_proj", "v_proj")],
                qkv_bias=[getattr(layer.self_attn, name).bias for name in ("q_proj", "k_proj", "v_proj")],
                q_norm=layer.self_attn.q_norm.weight if hasattr(layer.self_attn, "q_norm") else None,
                k_norm=layer.self_attn.k_norm.weight if hasattr(layer.self_attn, "k_norm") else None,
                output=layer.self_attn.o_proj.weight,
                post_norm=layer.post_attention_layernorm.weight,
                gate=layer.mlp.gate_proj.weight,
                up=layer.mlp.up_proj.weight,
                down=layer.mlp.down_proj.weight,
            )
            for layer in decoder.layers
        ],
        final_norm=decoder.norm.weight.float(),
        head=torch.ops.negotiator_kernels.pack_linear(untyped.get_output_embeddings().weight),
        heads=config.num_attention_heads,
        gated_width=config.intermediate_size,
        vocabulary=config.vocab_size,
        epsilon=config.rms_norm_eps,
        scale=attention.scaling,
    )
