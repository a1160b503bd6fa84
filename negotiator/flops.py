"""How much arithmetic a model's passes are, from its configuration and what each token sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from negotiator.types import PackedBatch, TurnSample


class Work(NamedTuple):
    """What somebody computes in a step; padding does not count."""

    tokens: int
    trained: int  # rows of logits: those that a gradient comes from, or that a token is sampled from
    pairs: int  # of a token and one that it sees, itself included

    @classmethod
    def of_batches(cls, batches: Sequence[PackedBatch]) -> Work:
        pairs = 0
        for segment in (segment for batch in batches for segment in batch.segments):
            own, prefix = segment.end - segment.start, segment.prefix_end - segment.prefix_start
            pairs += own * prefix + own * (own + 1) // 2
        tokens = sum(len(batch.input_ids) for batch in batches)
        return cls(tokens, sum(int(batch.mask.sum()) for batch in batches), pairs)

    @classmethod
    def of_samples(cls, samples: Sequence[TurnSample]) -> Work:
        """Each computed alone."""
        lengths = [len(sample.prompt_ids) + len(sample.response_ids) - 1 for sample in samples]
        trained = sum(len(sample.response_ids) for sample in samples)
        return cls(sum(lengths), trained, sum(n * (n + 1) // 2 for n in lengths))


class Model(NamedTuple):
    """The sizes that say how much arithmetic a token is."""

    matrices: int  # parameters of all linear layers but the output embedding
    head: int  # of the output embedding
    attention: int  # layers times heads times head dimension

    @classmethod
    def of(cls, config: PretrainedConfig) -> Model:
        model = without_weights(config)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            matrices=sum(layer.weight.numel() for layer in linear_layers(model)),
            head=model.get_output_embeddings().weight.numel(),
            attention=config.num_hidden_layers * config.num_attention_heads * head_dim,
        )

    def forward(self, work: Work) -> int:
        """Two operations a product; attention has two products. Logits count for the rows they are needed of."""
        return 2 * (self.matrices * work.tokens + self.head * work.trained) + 4 * self.attention * work.pairs

    def flop(self, work: Work) -> int:
        """Of a forward and a backward pass, which has a product for each of both factors.

        Attention counts for what is really seen, and nothing counts that is computed a second time, as by activation
        checkpointing.
        """
        return 3 * self.forward(work)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model with shapes alone."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def linear_layers(model: PreTrainedModel) -> list[nn.Linear]:
    """All but the output embedding."""
    return [module for module in model.get_decoder().modules() if isinstance(module, nn.Linear)]
