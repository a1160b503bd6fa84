"""What the embedded engine finds in its cache changes no answer, however much is cancelled or evicted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import torch
from engine_cases import VOCABULARY, engine_of, random_ids, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from negotiator.data import load_dilemmas
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.types import Generation, SamplingParams

REAL = "models/SmolLM2-135M-Instruct"


def test_cache_hits_change_no_bit_of_a_logprob() -> None:
    """In bf16, where any difference would grow: all log-probs after a prompt that is not cached, is cached
    wholly or partly, or read together with seven others."""
    tokenizer = AutoTokenizer.from_pretrained(REAL)
    engine = engine_of(AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.bfloat16).eval())
    assert engine.path == "native code"
    story, *others = (tokenizer.encode(dilemma.text)[:90] for dilemma in load_dilemmas()[:8])
    prompts = [story, *(story[:70] + other[:9] for other in others)]
    every = range(len(tokenizer))

    async def ask(*prompts: list[int]) -> torch.Tensor:
        return torch.tensor(await asyncio.gather(*(engine.next_logprobs(prompt, every) for prompt in prompts)))

    async def main() -> None:
        (cold,) = await ask(story)
        (warm,) = await ask(story)
        engine.flush()
        await engine.warm(story[:70])
        assert engine.stats().cached_prompt_tokens == len(story) - 1
        partly, *_ = await ask(*prompts)
        assert engine.stats().cached_prompt_tokens == len(story) - 1 + 8 * 70
        together, *_ = await ask(*prompts)
        engine.flush()
        at_once, *_ = await ask(*prompts)
        for found in (warm, partly, together, at_once):
            assert torch.equal(found, cold)

    asyncio.run(main())


def test_cache_hits_change_no_bit_of_an_answer() -> None:
    prompt = random_ids(60)
    engine = engine_of(tiny(dtype=torch.bfloat16))
    requests = [SamplingParams(max_tokens=30, seed=seed) for seed in range(8)]

    async def main() -> None:
        alone = []
        for sampling in requests:
            engine.flush()
            alone.append(await engine.generate(prompt, sampling))
        for group in [await asyncio.gather(*(engine.generate(prompt, s) for s in requests)) for _ in range(2)]:
            for found, expected in zip(group, alone, strict=True):
                assert (found.ids, found.logprobs) == (expected.ids, expected.logprobs)

    asyncio.run(main())


class Dialogues:
    """Chains of requests, each going on from the answer to the one before; some are given up before it is there."""

    def __init__(self, engine: EmbeddedEngine, seed: int) -> None:
        self.engine = engine
        self.rng = random.Random(seed)
        self.scenarios = [random_ids(self.rng.randint(4, 30), seed=i) for i in range(12)]
        self.finished: list[tuple[list[int], list[tuple[int, Generation, SamplingParams]]]] = []
        self.cancelled = 0

    async def hold(self) -> None:
        tokens, said = list(self.rng.choice(self.scenarios)), []
        for _ in range(self.rng.randint(1, 4)):
            tokens += self.rng.choices(range(VOCABULARY), k=self.rng.randint(1, 5))
            temperature = self.rng.choice((0.0, 0.7, 1.0))
            sampling = SamplingParams(self.rng.randint(1, 6), temperature, seed=self.rng.randint(0, 99))
            call = asyncio.create_task(self.engine.generate(tokens, sampling))
            if self.rng.random() < 0.3:
                for _ in range(self.rng.randint(0, 8)):
                    await asyncio.sleep(0)
                call.cancel()
            await asyncio.wait((call,))
            if call.cancelled():
                self.cancelled += 1
                if self.rng.random() < 0.5:
                    break
                continue  # says more, without an answer
            said.append((len(tokens), call.result(), sampling))
            tokens += call.result().ids
        self.finished.append((tokens, said))

    async def hold_some(self, numbers: Iterator[int]) -> None:
        for _ in numbers:
            await self.hold()


def test_a_thousand_dialogues_under_cancellation_in_a_tiny_cache() -> None:
    engine = engine_of(tiny(), max_running=6, cache_tokens=160, prefill_tokens=24)
    dialogues = Dialogues(engine, seed=0)

    async def main() -> None:
        numbers = iter(range(1000))
        async with asyncio.timeout(120):
            await asyncio.gather(*(dialogues.hold_some(numbers) for _ in range(12)))

    asyncio.run(main())
    assert len(dialogues.finished) == 1000 and dialogues.cancelled > 200
    assert [*engine._running, *engine._waiting] == []
    assert engine._cache.available == 160
    engine.flush()
    assert sorted(engine._cache._free) == list(range(160))  # every slot came back, none of them twice

    answers, plain = 0, tiny()
    for first in range(0, 1000, 100):
        some = dialogues.finished[first : first + 100]
        texts = [torch.tensor(tokens) for tokens, _ in some]
        with torch.no_grad():  # what is padded after a token does not change its logits
            logits = plain(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)).logits
        for row, (_, said) in zip(logits, some, strict=True):
            for start, generation, sampling in said:
                after = row[start - 1 : start - 1 + len(generation.ids)] / (sampling.temperature or 1.0)
                expected = after.log_softmax(-1).gather(1, torch.tensor(generation.ids)[:, None])[:, 0]
                torch.testing.assert_close(torch.tensor(generation.logprobs), expected, atol=1e-4, rtol=0)
            answers += len(said)
    stats = engine.stats()
    assert answers > 1000 and stats.cached_prompt_tokens > 0.2 * stats.prompt_tokens
