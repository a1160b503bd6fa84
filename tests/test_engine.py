"""The embedded engine against Hugging Face: same tokens, same log-probs, whatever is cached, batched or cancelled."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from engine_cases import after, assert_same, engine_of, generate_all, random_ids, reference_logprobs, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from negotiator.data import load_dilemmas
from negotiator.engines.forward import HuggingFaceForward
from negotiator.engines.kv_cache import KVCache
from negotiator.types import Generation, SamplingParams

REAL = "models/SmolLM2-135M-Instruct"


def generate_greedily(model: PreTrainedModel, prompts: list[list[int]], max_tokens: int) -> list[tuple[int, ...]]:
    """Hugging Face's own answers to prompts of one length, which need no padding."""
    ids = torch.tensor(prompts)
    with torch.no_grad():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    eos = model.generation_config.eos_token_id
    answers = [row[ids.shape[1] :].tolist() for row in output]
    return [tuple(a[: a.index(eos) + 1] if eos in a else a) for a in answers]


def test_greedy_equals_hugging_face_generate() -> None:
    """On 50 prompts: short ones, one story three times, and beginnings of dilemmas."""
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    own, plain = (AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval() for _ in range(2))
    story = tokenizer.encode("Two neighbours share one well in a dry summer, and each has a reason to draw first. " * 3)
    texts = ("Hi", "The capital of France is", "Write a haiku about rain.\n", "def fib(n):\n    ", "Once upon a time, ")
    endings = (" What would you do?", " The first says:", " The second says:")
    groups = [[tokenizer.encode(text)] for text in texts] + [[story + tokenizer.encode(ending)] for ending in endings]
    dilemmas = [tokenizer.encode(dilemma.text) for dilemma in load_dilemmas()]
    for first, length in ((0, 5), (14, 18), (28, 31)):
        groups.append([dilemma[:length] for dilemma in dilemmas[first : first + 14]])
    prompts = [prompt for group in groups for prompt in group]
    assert len({tuple(prompt) for prompt in prompts}) == 50

    engine = engine_of(own, max_running=8, prefill_tokens=24)
    assert engine.path == "native code"
    greedy = SamplingParams(max_tokens=10, temperature=0, stop_ids=(tokenizer.eos_token_id,))
    generations = generate_all(engine, [(prompt, greedy) for prompt in prompts], ticks=3)
    expected = [answer for group in groups for answer in generate_greedily(plain, group, 10)]
    assert [generation.ids for generation in generations] == expected
    for prompt, generation in list(zip(prompts, generations, strict=True))[:8]:
        logprobs = reference_logprobs(plain, prompt, generation.ids, 0)
        torch.testing.assert_close(torch.tensor(generation.logprobs), logprobs, atol=1e-4, rtol=0)
    assert engine.stats().cached_prompt_tokens > len(story)  # the later stories reuse the first


@pytest.mark.parametrize(
    ("config", "more", "path"),
    [
        (LlamaConfig, {}, "native code"),
        (Qwen2Config, {}, "native code"),
        (Qwen3Config, {}, "native code"),
        (LlamaConfig, {"attention_bias": True}, "o_proj has a bias"),
        (MistralConfig, {"sliding_window": None}, "MistralForCausalLM"),
        (GemmaConfig, {}, "GemmaForCausalLM"),
        (GPT2Config, {"head_dim": None, "num_key_value_heads": None, "bos_token_id": None}, "GPT2LMHeadModel"),
    ],
)
def test_sampled_logprobs_are_those_of_a_plain_forward(config: type, more: dict[str, object], path: str) -> None:
    plain, engine = tiny(config, **more), engine_of(tiny(config, **more), max_running=5, prefill_tokens=7)
    assert path in engine.path
    requests = [
        (random_ids(length, seed=length), SamplingParams(max_tokens=9, temperature=t, top_p=0.9, seed=length))
        for length, t in zip((1, 2, 13, 30, 31, 50, 64), (0.0, 0.3, 0.7, 1.0, 1.5, 0.7, 0.1), strict=True)
    ]
    for (prompt, sampling), result in zip(requests, generate_all(engine, requests, ticks=2), strict=True):
        expected = reference_logprobs(plain, prompt, result.ids, sampling.temperature)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=0)
        assert (len(result.ids), result.finish_reason) == (9, "length")


def test_a_stop_token_ends_and_is_kept() -> None:
    engine = engine_of(tiny())
    prompt, sampling = random_ids(5), SamplingParams(max_tokens=20, seed=3)
    (free,) = generate_all(engine, [(prompt, sampling)])
    stop = free.ids[7]
    length = free.ids.index(stop) + 1
    stopping = SamplingParams(max_tokens=20, seed=3, stop_ids=(stop,))
    (stopped,) = generate_all(engine, [(prompt, stopping)])
    assert (stopped.ids, stopped.finish_reason) == (free.ids[:length], "stop")


def test_cached_tokens_are_counted_exactly_and_change_nothing() -> None:
    prefix = random_ids(40)
    requests = [(prefix + random_ids(3 + i, seed=i), SamplingParams(max_tokens=6, seed=i)) for i in range(4)]
    for i in range(4):
        requests[i][0][40] = i  # no two share more than the prefix
    cold = [generate_all(engine_of(tiny()), [request])[0] for request in requests]
    assert [c.cached_tokens for c in cold] == [0] * 4

    engine = engine_of(tiny())
    asyncio.run(engine.warm(prefix))
    warm = generate_all(engine, requests)
    assert [w.cached_tokens for w in warm] == [40] * 4
    assert_same(warm, cold)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.cached_prompt_tokens) == (40 + sum(len(p) for p, _ in requests), 160)
    assert (stats.reusable_prompt_tokens, stats.generated_tokens) == (160, 24)

    # The same again: all but the last prompt token. Going on from an answer: all but its last token and what follows.
    assert [g.cached_tokens for g in generate_all(engine, requests)] == [len(p) - 1 for p, _ in requests]
    longer = requests[0][0] + list(warm[0].ids) + [1, 2]
    assert generate_all(engine, [(longer, SamplingParams(max_tokens=1))])[0].cached_tokens == len(longer) - 3
    before = engine.stats().forward_passes
    asyncio.run(engine.warm(prefix))
    assert engine.stats().forward_passes == before


def test_a_prompt_is_shared_as_soon_as_it_is_computed() -> None:
    engine = engine_of(tiny(), prefill_tokens=20)
    prompt = random_ids(20)
    results = generate_all(engine, [(prompt, SamplingParams(max_tokens=5, temperature=0)) for _ in range(3)])
    assert [r.cached_tokens for r in results] == [0, 19, 19]
    assert_same(results[1:], [results[0]] * 2)


def test_a_seed_fixes_the_answer_whatever_runs_beside_it() -> None:
    model = tiny()
    requests = [(random_ids(5 + 7 * i, seed=i), SamplingParams(max_tokens=12, top_p=0.95, seed=i)) for i in range(8)]
    together = generate_all(engine_of(model, prefill_tokens=16), requests)
    staggered = generate_all(engine_of(model, max_running=3), requests[::-1], ticks=2)[::-1]
    alone = [generate_all(engine_of(model), [request])[0] for request in requests]
    assert_same(together, alone)
    assert_same(staggered, alone)
    prompt = requests[0][0]
    seeds = generate_all(engine_of(model), [(prompt, SamplingParams(max_tokens=12, seed=s)) for s in range(8)])
    assert len({s.ids for s in seeds}) == 8
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()  # any token is as likely: ids show the random numbers themselves
    (uniform,) = generate_all(engine_of(model), [(prompt, SamplingParams(max_tokens=20))])
    assert len(set(uniform.ids)) > 10


def test_the_same_calls_give_the_same_bits() -> None:
    model = tiny()
    requests = [(random_ids(3 + 11 * i, seed=i % 3), SamplingParams(max_tokens=10, seed=i)) for i in range(8)]
    limits = {"max_running": 3, "cache_tokens": 120, "prefill_tokens": 16}
    engine = engine_of(model, **limits)
    first = generate_all(engine, requests, ticks=1)
    assert generate_all(engine_of(model, **limits), requests, ticks=1) == first
    engine.flush()
    assert generate_all(engine, requests, ticks=1) == first


def test_a_full_cache_makes_requests_wait_and_loses_no_slot() -> None:
    model = tiny()
    requests = [(random_ids(1 + i % 20, seed=i % 7), SamplingParams(max_tokens=1 + i % 11, seed=i)) for i in range(40)]
    requests.append((random_ids(20, seed=99), SamplingParams(max_tokens=13)))  # takes the whole cache
    engine = engine_of(model, max_running=6, cache_tokens=32, prefill_tokens=5)
    results = generate_all(engine, requests)
    assert_same(results, generate_all(engine_of(model), requests))
    assert engine._cache.available == 32
    engine.flush()  # asserts that every slot came back
    assert len(engine._cache._free) == 32


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False))
def test_cancelled_requests_leave_nothing_behind(rng: random.Random) -> None:
    model = tiny()
    requests = [
        (random_ids(rng.randint(1, 25), seed=rng.randint(0, 2)), SamplingParams(max_tokens=rng.randint(1, 8), seed=i))
        for i in range(10)
    ]
    engine = engine_of(model, max_running=4, cache_tokens=48, prefill_tokens=6)
    schedule = [(rng.randint(0, 9), rng.choice((0, 1, 3, 6, 9, 12, None))) for _ in requests]

    async def send(i: int) -> Generation:
        start, life = schedule[i]  # in turns of the event loop
        call = asyncio.create_task(after(start, lambda: engine.generate(*requests[i])))
        if life is not None:
            for _ in range(start + life):
                await asyncio.sleep(0)
            call.cancel()
        return await call

    async def main() -> list[Generation | BaseException]:
        return await asyncio.gather(*(send(i) for i in range(len(requests))), return_exceptions=True)

    results = asyncio.run(main())
    for result, expected in zip(results, generate_all(engine_of(model), requests), strict=True):
        assert isinstance(result, asyncio.CancelledError) or result.ids == expected.ids
    assert [*engine._running, *engine._waiting] == []
    assert engine._cache.available == 48
    engine.flush()


def test_next_logprobs_equal_a_plain_forward() -> None:
    plain, engine = tiny(), engine_of(tiny())
    prompts = [random_ids(n, seed=n) for n in (1, 12, 33)]

    async def main() -> list[list[float]]:
        await engine.warm(prompts[2][:20])
        sampling = SamplingParams(max_tokens=4)
        asked = (engine.next_logprobs(p, [3, 50, 3, 96]) for p in prompts)
        *results, _ = await asyncio.gather(*asked, engine.generate(prompts[1], sampling))  # rows of both kinds at once
        return results

    for prompt, result in zip(prompts, asyncio.run(main()), strict=True):
        with torch.no_grad():
            expected = plain(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        assert result == pytest.approx(expected[[3, 50, 3, 96]].tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_weights_are_served_and_the_old_cache_is_gone(dtype: torch.dtype) -> None:
    model = tiny(dtype=dtype)
    engine = engine_of(model)
    request = (random_ids(30), SamplingParams(max_tokens=8, temperature=0))
    before = [generate_all(engine, [request])[0] for _ in range(2)]
    assert [(b.cached_tokens, b.weight_version) for b in before] == [(0, 0), (29, 0)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    asyncio.run(engine.update_weights(model.named_parameters(), version=7))
    (after,) = generate_all(engine, [request])
    assert (after.cached_tokens, after.weight_version) == (0, 7)
    assert after.logprobs != before[0].logprobs
    assert generate_all(engine_of(model), [request])[0].logprobs == after.logprobs

    foreign = {name: tensor.clone() for name, tensor in tiny(dtype=dtype).named_parameters()}
    asyncio.run(engine.update_weights(foreign.items(), version=8))
    assert generate_all(engine, [request])[0].logprobs == before[0].logprobs
    with pytest.raises(ValueError, match="no parameter"):
        asyncio.run(engine.update_weights([("lm_head.weight", torch.zeros(1))], version=9))


def test_bf16_logits_are_not_rounded_to_bf16() -> None:
    model = tiny(dtype=torch.bfloat16)
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    logits = HuggingFaceForward(model, KVCache(model, 1))._logits(hidden)
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    assert (logits - exact).abs().max() < 1e-5


def test_requests_that_can_never_run_are_refused() -> None:
    engine = engine_of(tiny(), cache_tokens=50)

    def refused(prompt: list[int], message: str, **sampling: float) -> None:
        with pytest.raises(ValueError, match=message):
            asyncio.run(engine.generate(prompt, SamplingParams(**{"max_tokens": 4} | sampling)))

    refused(random_ids(48), "cache_tokens")
    refused(random_ids(5), "context", max_tokens=252)
    refused([], "empty")
    refused([97], "token ids")
    refused([1], "max_tokens", max_tokens=0)
    refused([1], "temperature", temperature=-1.0)
    refused([1], "top_p", top_p=0.0)
    refused([1], "seed", seed=2**63)
    assert len(generate_all(engine, [(random_ids(47), SamplingParams(max_tokens=4))])[0].ids) == 4


def test_an_error_in_a_step_reaches_every_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(tiny(), max_running=2)
    requests = [(random_ids(5, seed=i), SamplingParams(max_tokens=5)) for i in range(4)]

    async def main() -> list[Generation | BaseException]:
        return await asyncio.gather(*(engine.generate(*request) for request in requests), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_forward", lambda spans, rows: torch.zeros(2, 2) @ torch.zeros(1))
        assert all(isinstance(result, RuntimeError) for result in asyncio.run(main()))
    engine.flush()
    assert all(isinstance(result, Generation) for result in asyncio.run(main()))
    engine._model.train()
    assert all("eval()" in str(result) for result in asyncio.run(main()))


def test_close_fails_what_is_under_way() -> None:
    engine = engine_of(tiny(), max_running=1)

    async def main() -> list[Generation | BaseException]:
        tasks = [asyncio.create_task(engine.generate([1, 2], SamplingParams(max_tokens=100))) for _ in range(2)]
        for _ in range(5):
            await asyncio.sleep(0)
        await engine.close()
        return await asyncio.gather(*tasks, engine.warm([1]), return_exceptions=True)

    assert all(isinstance(r, RuntimeError) and "closed" in str(r) for r in asyncio.run(main()))


def test_a_model_whose_answers_depend_on_their_neighbours_is_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    with pytest.raises(ValueError, match="longrope"):
        engine_of(tiny(LlamaConfig, rope_parameters=rope | factors))
