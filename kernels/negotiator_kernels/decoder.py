"""All layers of a Llama-like decoder over a paged key/value cache, as one native call on the CPU.

    T  tokens, the newest of S sequences    R  rows whose logits are wanted    L  layers    D  hidden size
    Hq query heads    Hkv key/value heads    d  head dimension    F  gated width    V  vocabulary
    P  slots of the cache

A layer: RMS norm, projection to queries, keys and values (with a bias, or a norm over each head, where the model has
them), rotation, attention, output projection; RMS norm, silu(gate) * up, down projection. Its reference is the Hugging
Face module itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class LayerWeights(NamedTuple):
    """What csrc/decoder.cpp expects of a layer, in its order. Norms and biases fp32, empty where there are none."""

    input_norm: Tensor  # [D]
    qkv: Tensor  # packed [(Hq + 2 Hkv) d, D]
    qkv_bias: Tensor  # [(Hq + 2 Hkv) d]
    q_norm: Tensor  # [d]
    k_norm: Tensor  # [d]
    output: Tensor  # packed [D, Hq d]
    post_norm: Tensor  # [D]
    gate_up: Tensor  # packed [F, D] twice, panel by panel in turns
    down: Tensor  # packed [D, F]

    @staticmethod
    def pack(
        *,
        input_norm: Tensor,
        qkv: Sequence[Tensor],
        qkv_bias: Sequence[Tensor | None],
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        output: Tensor,
        post_norm: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> LayerWeights:
        """Copies weights [outputs, inputs], fp32 or bf16, as they are; norms and biases as fp32."""
        pack = torch.ops.negotiator_kernels.pack_linear
        biases = [bias for bias in qkv_bias if bias is not None]
        assert len(biases) in (0, len(qkv)), "either all of queries, keys and values have a bias or none"
        empty = torch.empty(0)
        return LayerWeights(
            input_norm=input_norm.float(),
            qkv=pack(torch.cat(list(qkv))),
            qkv_bias=torch.cat(biases).float() if biases else empty,
            q_norm=empty if q_norm is None else q_norm.float(),
            k_norm=empty if k_norm is None else k_norm.float(),
            output=pack(output),
            post_norm=post_norm.float(),
            gate_up=pack(gate, up),
            down=pack(down),
        )


class DecoderWeights(NamedTuple):
    """A whole model, ready for `decode`."""

    layers: Sequence[LayerWeights]
    final_norm: Tensor  # [D] fp32
    head: Tensor  # packed [V, D]
    heads: int  # Hq
    gated_width: int  # F
    vocabulary: int  # V
    epsilon: float  # of the norms
    scale: float  # of the attention


def decode(
    hidden: Tensor,  # [T, D] fp32, the embedded tokens; overwritten
    cos: Tensor,  # [T, d] fp32
    sin: Tensor,  # [T, d] fp32
    keys: Tensor,  # [L, P, Hkv, d] fp32 or bf16
    values: Tensor,  # [L, P, Hkv, d], likewise
    new_slots: Tensor,  # [T] int64, where the keys and values of these tokens go
    slots: Tensor,  # those of all tokens of all sequences; see `paged_attention`
    slot_starts: Tensor,  # [S + 1] int64
    query_starts: Tensor,  # [S + 1] int64
    rows: Tensor,  # [R] int64
    weights: DecoderWeights,
) -> Tensor:  # [R, V] fp32
    """Logits after the tokens of `rows`. Products, norms and attention in fp32.

    Where the processor multiplies bf16 itself, activations are rounded to bf16 for the products with bf16 weights.
    Raises RuntimeError for arguments that do not fit together.
    """
    logits: Tensor = torch.ops.negotiator_kernels.decoder(
        hidden,
        cos.contiguous(),
        sin.contiguous(),
        keys,
        values,
        new_slots,
        slots,
        slot_starts,
        query_starts,
        rows,
        [tensor for layer in weights.layers for tensor in layer],
        weights.final_norm,
        weights.head,
        weights.heads,
        weights.gated_width,
        weights.vocabulary,
        weights.epsilon,
        weights.scale,
    )
    return logits
