"""Small models and made-up samples that several test files share."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from negotiator.attention import use_negotiator_attention
from negotiator.types import TurnSample

SMOLLM2 = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct"
VOCABULARY = 97


def tiny_llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> LlamaForCausalLM:
    """Two layers, grouped-query attention, weights large enough for peaked logits; the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # not model.to(): the rotary frequencies stay in fp32, as after loading
        parameter.data = parameter.data.to(dtype)
    use_negotiator_attention(model)
    return model


def made_up_samples(groups: int = 3, per_group: int = 4, seed: int = 0) -> list[TurnSample]:
    """Samples of ragged lengths; those of a group share a prefix, and their sampling log-probs are plausible."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(rng.randint(low, high)))

    samples = []
    for group in range(groups):
        prefix = ids(5, 20)
        for _ in range(per_group):
            response = ids(1, 12)
            samples.append(
                TurnSample(
                    prompt_ids=prefix + ids(1, 15),
                    response_ids=response,
                    sampling_logprobs=tuple(-rng.expovariate(0.3) for _ in response),
                    advantage=rng.gauss(0, 1),
                    prefix_key=(group // 2, "agent1" if group % 2 else "agent2"),
                    prefix_len=len(prefix),
                )
            )
    return samples
