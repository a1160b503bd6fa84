"""Small engines and ways to ask them that several test files share."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from negotiator.config import EngineConfig
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.types import Generation, SamplingParams

VOCABULARY = 97


def tiny(config: type = LlamaConfig, dtype: torch.dtype = torch.float32, **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": None,
        "initializer_range": 0.2,  # far from uniform in attention and output
    }
    model = AutoModelForCausalLM.from_config(config(**sizes | more), attn_implementation="sdpa")
    return model.to(dtype).eval()


def engine_of(model: PreTrainedModel, **limits: int) -> EmbeddedEngine:
    defaults = {"max_running": 8, "cache_tokens": 2048, "prefill_tokens": 64}
    return EmbeddedEngine(model, EngineConfig(**defaults | limits))


def random_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


async def after(ticks: int, call: Callable[[], Awaitable[Generation]]) -> Generation:
    for _ in range(ticks):
        await asyncio.sleep(0)
    return await call()


def generate_all(
    engine: EmbeddedEngine, requests: Sequence[tuple[list[int], SamplingParams]], ticks: int = 0
) -> list[Generation]:
    """Sends each request `ticks` turns of the event loop after the one before."""

    async def main() -> list[Generation]:
        calls = (
            after(i * ticks, lambda prompt=prompt, sampling=sampling: engine.generate(prompt, sampling))
            for i, (prompt, sampling) in enumerate(requests)
        )
        return await asyncio.gather(*calls)

    return asyncio.run(main())


def reference_logprobs(
    model: PreTrainedModel, prompt: list[int], ids: Sequence[int], temperature: float
) -> torch.Tensor:
    """What a plain forward pass of an untouched model says of each of `ids`."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    return (logits / (temperature or 1.0)).log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def assert_same(actual: Sequence[Generation], expected: Sequence[Generation]) -> None:
    """Same tokens, and log-probs that differ by rounding only."""
    for a, b in zip(actual, expected, strict=True):
        assert a.ids == b.ids
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
