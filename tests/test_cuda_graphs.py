"""The passes that a GPU records, computed here without recording (their kernels interpreted), against the model's own.

What only a GPU can show, that a recorded pass says the same, is in `test_cuda.py`.
"""

from __future__ import annotations

import asyncio
import os

import pytest
import torch
from helpers import VOCABULARY
from interpreter import let_scalars_bound_loops
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decode, gpu
from negotiator.attention import use_negotiator_attention
from negotiator.config import EngineConfig
from negotiator.engines.cuda_graphs import GraphedForward, padded_size
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.engines.forward import HuggingFaceForward, Span
from negotiator.engines.kv_cache import KVCache
from negotiator.types import SamplingParams
from negotiator_kernels import triton_attention

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # see conftest.py
CONFIG = EngineConfig(max_running=3, cache_tokens=256, prefill_tokens=4)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several pieces a sequence; fewer heads than elsewhere, because the interpreter is slow."""
    monkeypatch.setattr(triton_attention, "PIECE", 4)
    if DEVICE == "cpu":
        let_scalars_bound_loops(monkeypatch)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.2,  # far from uniform in attention and output
    )
    model = LlamaForCausalLM(config).eval().to(DEVICE)
    use_negotiator_attention(model)
    return model


def random_ids(count: int, seed: int) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_few_sizes_are_recorded():
    assert [padded_size(n) for n in (1, 2, 3, 5, 64, 65, 256, 257, 512, 513, 1088)] == [
        1, 2, 4, 8, 64, 128, 256, 512, 512, 768, 1280,
    ]  # fmt: skip
    assert all(n <= padded_size(n) < max(2 * n, n + 256) for n in range(1, 2000))


def test_passes_are_the_models_own():
    """A prompt in pieces, a longer pass before a shorter one, decoding after a prefix in common, rows nobody wants."""
    model, tokens = tiny(), random_ids(40, seed=1)
    results = []
    for make in (lambda cache: HuggingFaceForward(model, cache), lambda cache: GraphedForward(model, cache, CONFIG)):
        cache = KVCache(model, 256)
        for pool in (cache.keys, cache.values):
            pool.fill_(torch.nan)
        forward, logits = make(cache), []

        def run(spans, rows, forward=forward, logits=logits):
            found = forward([Span(r, start, end, ids[start:end]) for r, ids, start, end in spans], rows)
            logits.append(found.clone())

        first = cache.reserve(tokens[:10], 20)
        run([(first, tokens, 0, 4)], [])
        run([(first, tokens, 4, 10)], [5])
        cache.share(first, tokens[:10])
        ids2, ids3 = tokens[:10] + tokens[20:30], tokens[:10] + tokens[30:40]
        second, third = cache.reserve(ids2, 20), cache.reserve(ids3, 20)
        assert second.shared == third.shared == 10
        run([(second, ids2, 10, 13), (first, tokens, 10, 11), (third, ids3, 10, 13)], [3, 6])
        run([(third, ids3, 13, 14), (first, tokens, 11, 12)], [0])
        run([(third, ids3, 14, 15), (second, ids2, 13, 14), (first, tokens, 12, 13)], [1, 0, 2])
        run([(second, ids2, 14, 15)], [0])
        results.append((logits, cache.keys.clone(), cache.values.clone()))
    (expected, *expected_cache), (found, *found_cache) = results
    assert [len(f) for f in found] == [0, 1, 2, 1, 3, 1]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5)
    for a, b in zip(found_cache, expected_cache, strict=True):  # nothing is written elsewhere
        torch.testing.assert_close(a, b, rtol=0, atol=5e-5, equal_nan=True)


def test_the_engine_says_the_same_through_it():
    model = tiny()
    prompts = [random_ids(8, seed=2) + random_ids(n, seed=n) for n in (3, 1)]

    def generate(engine: EmbeddedEngine):
        async def main():
            await engine.warm(prompts[0][:8])
            sampling = SamplingParams(max_tokens=3, temperature=0)
            return await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in prompts))

        return asyncio.run(main())

    plain, graphed = EmbeddedEngine(model, CONFIG), EmbeddedEngine(model, CONFIG)
    plain._forward = HuggingFaceForward(model, plain._cache)
    graphed._forward = GraphedForward(model, graphed._cache, CONFIG)
    for a, b in zip(generate(graphed), generate(plain), strict=True):
        assert (a.ids, a.cached_tokens) == (b.ids, 8)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_only_weights_that_moved_are_recorded_anew():
    model = tiny()
    forward = GraphedForward(model, KVCache(model, 8), CONFIG)
    graphs = {4: object()}
    forward._graphs, forward._weights = graphs, [weight.data_ptr() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    forward.weights_changed()
    assert list(graphs) == [4]
    last = [*model.parameters()][-1]
    last.data = last.data.clone()
    forward.weights_changed()
    assert not graphs


def test_a_cache_that_does_not_fit_the_model_is_told():
    model = tiny()
    model.config.num_key_value_heads = 2
    forward = GraphedForward(model, KVCache(model, 8), CONFIG)
    with pytest.raises(ValueError, match=r"are \(1, 16\) and \(1, 16\) a token, its config says \(2, 16"):
        forward.compute(1)


def test_the_benchmark_compares_both_ways(monkeypatch, capsys):
    """As far as it goes without a GPU: it would notice wrong attention and logits."""
    monkeypatch.setattr(decode, "MODELS", {"tiny": tiny().config})
    monkeypatch.setattr(decode, "make_model", lambda config, device, dtype: tiny())
    monkeypatch.setattr(triton_attention, "PIECE", 128)
    for name, value in (("GROUP", 2), ("OWN", 8), ("STEPS", 1), ("RUNNING", (2,)), ("PREFIXES", (9,))):
        monkeypatch.setattr(decode, name, value)
    monkeypatch.setattr(decode, "ATTENTION_LIMITS", {torch.float32: 2e-6})
    rows, wrong = gpu.decoding(torch.device(DEVICE), seconds=60)
    assert wrong == []
    assert [row.what.partition(" of a layer")[0] for row in rows] == [
        "kernel by kernel", "graphs", "sampling", "sampling, reference", "attention", "attention",
    ]  # fmt: skip
    assert gpu.graph_speedups(rows) == {"tiny, 2 after 9": pytest.approx(rows[0].ms / rows[1].ms, abs=0.01)}
    monkeypatch.setattr(decode, "ATTENTION_LIMITS", {torch.float32: 0.0})
    monkeypatch.setattr(decode, "LOGIT_LIMIT", 0.0)
    assert gpu.decoding(torch.device(DEVICE), seconds=60)[1] == ["attention, torch.float32", "graphs"]
    assert gpu.decoding(torch.device(DEVICE), seconds=-1)[0] == []
    assert "no time for tiny, 2 after 9" in capsys.readouterr().out
