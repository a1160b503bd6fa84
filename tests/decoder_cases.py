"""Small models for the native decoder, Hugging Face's answers in fp64, and random ways to compute texts in pieces."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from negotiator.engines.forward import Span
from negotiator.engines.kv_cache import KVCache, Reservation
from negotiator.engines.native_forward import NativeForward

VOCABULARY = 97
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# None of the sizes fills its last panel or vector; 330 and 530 take more than one part of a sum.
MODELS = {
    "llama": (LlamaConfig, {"hidden": 54, "gated": 70, "heads": 6, "kv_heads": 2, "head_dim": 16}),
    "llama3": (LlamaConfig, {"hidden": 64, "gated": 34, "heads": 4, "kv_heads": 1, "head_dim": 24, "rope": LLAMA3}),
    "qwen2": (Qwen2Config, {"hidden": 330, "gated": 530, "heads": 3, "kv_heads": 3, "head_dim": 80}),
    "qwen3": (Qwen3Config, {"hidden": 38, "gated": 100, "heads": 8, "kv_heads": 2, "head_dim": 18, "tied": True}),
}


def build(name: str, dtype: torch.dtype = torch.float32, **more: object) -> PreTrainedModel:
    """Two layers with weights, biases and norms all random, at a size that keeps attention far from uniform."""
    kind, sizes = MODELS[name]
    torch.manual_seed(0)
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["gated"],
        num_hidden_layers=2,
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        head_dim=sizes["head_dim"],
        rope_parameters=sizes.get("rope"),
        tie_word_embeddings=sizes.get("tied", False),
        rms_norm_eps=1e-3,
        max_position_embeddings=512,
        **more,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(std=0.5).add_(1.0)
        else:
            parameter.data.normal_(std=1.5 * parameter.shape[1] ** -0.5)
        parameter.data = parameter.data.to(dtype)
    return model


class RoundedCache(DynamicCache):
    """Hugging Face's cache in fp64, of numbers that `dtype` can hold."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = (x.to(self.dtype).double() for x in (key_states, value_states))
        return super().update(keys, values, *args, **kwargs)


class Expected(NamedTuple):
    logits: torch.Tensor  # [T, V]
    keys: torch.Tensor  # [layers, T, Hkv, d]
    values: torch.Tensor


def multiplies_bf16() -> bool:
    """Whether rows are rounded to bf16 here for a bf16 weight. Then its numbers are packed in pairs."""
    packed = torch.ops.negotiator_kernels.pack_linear(torch.tensor([[1.0, 2.0]]).bfloat16())
    return packed.flatten()[1].item() == 2.0


def exactly(model: PreTrainedModel) -> Callable[[Sequence[int], torch.dtype], Expected]:
    """The model's own forward pass in fp64, over a cache of the given dtype."""
    rounded = model.dtype == torch.bfloat16 and multiplies_bf16()
    exact = copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):  # theirs compute in fp32 whatever comes in
            module.forward = lambda x, m=module: torch.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
        if rounded and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().double(),))

    @torch.no_grad()
    def compute(tokens: Sequence[int], dtype: torch.dtype) -> Expected:
        cache = RoundedCache(dtype)
        logits = exact(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0]
        keys, values = (
            torch.stack([getattr(layer, name)[0].transpose(0, 1) for layer in cache.layers])
            for name in ("keys", "values")
        )
        return Expected(logits, keys, values)

    return compute


def worst(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest error, in units of the numbers' size; infinite where there is a NaN."""
    error = (found.double() - exact).abs().nan_to_num(nan=torch.inf)
    return (error.max() / exact.square().mean().sqrt()).item()


def random_ids(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(VOCABULARY), k=count)


@dataclass
class Text:
    tokens: list[int]
    reservation: Reservation
    computed: int  # leading tokens that are in the cache

    @property
    def left(self) -> int:
        return len(self.tokens) - self.computed


class Runner:
    """Texts in a cache whose slots lie scattered, unused ones holding NaN."""

    def __init__(self, model: PreTrainedModel, slots: int, cache_dtype: torch.dtype = torch.float32) -> None:
        self.cache = KVCache(model, slots)
        self.cache.keys, self.cache.values = (
            torch.full_like(x, torch.nan, dtype=cache_dtype) for x in (self.cache.keys, self.cache.values)
        )
        random.Random(1).shuffle(self.cache._free)
        self.forward = NativeForward(model, self.cache)

    def admit(self, tokens: list[int]) -> Text:
        reservation = self.cache.reserve(tokens[:-1], len(tokens))
        assert reservation is not None
        return Text(tokens, reservation, reservation.shared)

    def compute(self, work: Sequence[tuple[Text, int]], rows: Sequence[int]) -> torch.Tensor:
        """Logits at `rows` of a pass over so many further tokens of each text, which the cache shares from then on."""
        spans = []
        for text, count in work:
            start, text.computed = text.computed, text.computed + count
            spans.append(Span(text.reservation, start, text.computed, text.tokens[start : text.computed]))
        logits = self.forward(spans, rows)
        for text, _ in work:
            self.cache.share(text.reservation, text.tokens[: text.computed])
        return logits

    def cached(self, text: Text) -> tuple[torch.Tensor, torch.Tensor]:
        slots = torch.from_numpy(text.reservation.slots[: text.computed])
        return self.cache.keys[:, slots], self.cache.values[:, slots]


def texts_with_common_beginnings() -> list[list[int]]:
    """Two stories: four texts share 110, 110, 60 and 7 tokens of one; then the other, its first 101 tokens; a token."""
    story, other = random_ids(110, seed=1), random_ids(150, seed=2)
    texts = [story + random_ids(20, seed=3), story + random_ids(33, seed=4), story[:60] + random_ids(30, seed=5)]
    return [*texts, story[:7] + random_ids(9, seed=6), other, other[:101] + random_ids(12, seed=7), [5]]


def random_run(runner: Runner, rng: random.Random) -> tuple[list[Text], list[dict[int, torch.Tensor]]]:
    """Computes the texts in random pieces, decoding and prompts together; their logits at some positions, [V] each."""
    waiting = texts_with_common_beginnings()
    texts: list[Text] = []
    logits: list[dict[int, torch.Tensor]] = []
    while waiting or any(text.left for text in texts):
        if waiting and rng.random() < 0.7:
            texts.append(runner.admit(waiting.pop(0)))
            logits.append({})
        under_way = [i for i, text in enumerate(texts) if text.left]
        chosen = rng.sample(under_way, rng.randint(0, len(under_way)))
        work = [(i, rng.choice((1, 1, 1, 1, min(texts[i].left, 7), rng.randint(1, texts[i].left)))) for i in chosen]
        passed = [(i, texts[i].computed + n) for i, count in work for n in range(count)]
        rows = rng.choices(range(len(passed)), k=rng.randint(0, len(passed)))
        if work:
            found = runner.compute([(texts[i], count) for i, count in work], rows)
            assert found.shape == (len(rows), VOCABULARY)
            for row, values in zip(rows, found, strict=True):
                i, position = passed[row]
                logits[i][position] = values
    return texts, logits


def errors_of_a_random_run(runner: Runner, exact: Callable[..., Expected], seed: int) -> dict[str, float]:
    """The worst error of each kind."""
    errors = {"logits": 0.0, "keys": 0.0, "values": 0.0}
    for text, logits in zip(*random_run(runner, random.Random(seed)), strict=True):
        expected = exact(text.tokens, runner.cache.keys.dtype)
        keys, values = runner.cached(text)
        for name, found, wanted in (("keys", keys, expected.keys), ("values", values, expected.values)):
            errors[name] = max(errors[name], worst(found, wanted))
        for position, row in logits.items():
            errors["logits"] = max(errors["logits"], worst(row, expected.logits[position]))
    return errors
