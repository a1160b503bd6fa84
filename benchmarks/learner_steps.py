"""One full step, rollout and training, ours and that of TRL's GRPOTrainer: a group of texts after one prompt.

Both sample at temperature 1 from the whole vocabulary, exactly as many tokens as asked for, and are rewarded for the
share of vowels. Ours is `negotiator.train`'s step with dialogues of a single utterance, which is what TRL knows. TRL is
in its own defaults, but without gradient checkpointing, which costs it time, and without logs. Of two steps in a row,
after small ones, the second counts: it finds all memory, the optimizer's too, that it needs.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PrinterCallback, TrainerCallback

from benchmarks.learner_contenders import LOSS, denominator, wait
from benchmarks.workload import Shape, Workload
from negotiator import advantages
from negotiator.config import EngineConfig, JudgeConfig, OptimizerConfig
from negotiator.data import load_dilemmas, load_personas
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.judges import make_judges
from negotiator.learner import Learner
from negotiator.models import load_model, load_tokenizer
from negotiator.packing import pack, turn_samples
from negotiator.types import Dialogue, DialogueGroup, SamplingParams, Scenario, Utterance

BAR = Shape(scenarios=1, group=8, prefix=182, new_tokens=64)  # a prompt of 190 tokens
WARM_UP = BAR._replace(new_tokens=2)


def share_of_vowels(scenario: Scenario, dialogue: Dialogue) -> float:
    """A reward function that hardly ever gives two texts the same."""
    return 5 * vowels(dialogue.utterances[-1].text)


def vowels(text: str) -> float:
    return sum(text.count(vowel) for vowel in "aeiou") / max(1, len(text))


class StepPlayed(NamedTuple):
    seconds: float
    trained_tokens: int
    prompt_tokens: int
    rollout_seconds: float | None = None
    peak_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.seconds:,.2f} s, {self.tokens_per_s:,.1f} trained tokens/s"

    @property
    def cost(self) -> float:
        return self.seconds

    @property
    def tokens_per_s(self) -> float:
        return self.trained_tokens / self.seconds


class OurStepPlayer:
    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._runner, self._steps = device, asyncio.Runner(), 0
        self._optimizer = OptimizerConfig()
        self._tokenizer = load_tokenizer(path)
        self.model = load_model(path, device, dtype)
        self._learner = Learner(self.model, self._optimizer, LOSS, temperature=1.0)
        self._engine = EmbeddedEngine(self.model, EngineConfig())
        name = f"{share_of_vowels.__module__}:{share_of_vowels.__name__}"
        _, self._judge = make_judges(JudgeConfig(agreement=name, reward=name), None)
        pair = load_personas()[0]
        self._scenario = Scenario(0, load_dilemmas()[0], pair.a, pair.b, pair.id)
        self.about = self._engine.path

    def play(self, workload: Workload) -> StepPlayed:
        self._runner.run(self._step(workload))
        return self._runner.run(self._step(workload))

    async def _step(self, workload: Workload) -> StepPlayed:
        started = time.perf_counter()
        dialogues = await self._dialogues(workload)
        rolled_out = time.perf_counter()
        groups = [DialogueGroup(self._scenario, dialogues)]
        advantages.assign(groups)
        samples = turn_samples(groups, LOSS.train_roles)
        batches = pack(samples, self._optimizer.micro_batch_tokens)
        await self._engine.release()
        self._learner.step(self._steps, batches, denominator(samples))
        self._steps += 1
        await self._engine.update_weights(self._learner.weights(), self._steps)
        wait(self._device)
        return StepPlayed(
            seconds=time.perf_counter() - started,
            trained_tokens=sum(int(batch.mask.sum()) for batch in batches),
            prompt_tokens=len(workload.prompts[0]),
            rollout_seconds=rolled_out - started,
        )

    async def _dialogues(self, workload: Workload) -> list[Dialogue]:
        shape, prompt = workload.shape, workload.prompts[0]
        await self._engine.warm(workload.prefixes[0])
        sampling = (SamplingParams(shape.new_tokens, seed=i) for i in range(shape.group))
        generations = await asyncio.gather(*(self._engine.generate(prompt, some) for some in sampling))
        dialogues = []
        for index, generation in enumerate(generations):
            text = self._tokenizer.decode(list(generation.ids), skip_special_tokens=True)
            utterance = Utterance("agent1", text, prompt, shape.prefix, generation)
            dialogue = Dialogue(self._scenario, index, [utterance], completion=text)
            dialogue.score = await self._judge.score(self._scenario, dialogue)
            dialogue.state = "scored"
            dialogues.append(dialogue)
        return dialogues

    def processes(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()


def trl_off_reason() -> str | None:
    return None if importlib.util.find_spec("trl") else "trl is not installed"


class Clock(TrainerCallback):
    """Times each step of a transformers Trainer."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = self._began = 0.0  # of the last step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        wait(self._device)
        self.seconds = time.perf_counter() - self._began


class TRLPlayer:
    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._folder = tempfile.TemporaryDirectory()
        self._tokenizer = load_tokenizer(path)
        self.model = load_model(path, device, torch.float32)
        self.about = f"GRPOTrainer, fp32 weights, {dtype}"

    def play(self, workload: Workload) -> StepPlayed:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        shape, optimizer = workload.shape, OptimizerConfig()
        text = self._tokenizer.decode(list(workload.prompts[0]))
        trained: list[int] = []

        def reward(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
            trained.append(sum(map(len, completion_ids)))
            return [vowels(completion) for completion in completions]

        clock = Clock(self._device)
        config = GRPOConfig(
            output_dir=self._folder.name,
            max_steps=2,
            per_device_train_batch_size=shape.group,
            num_generations=shape.group,
            max_completion_length=shape.new_tokens,
            generation_kwargs={"min_new_tokens": shape.new_tokens},
            learning_rate=optimizer.lr,
            use_cpu=self._device.type == "cpu",
            bf16=self._dtype == torch.bfloat16,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=[reward],
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text}] * 2),
            processing_class=self._tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return StepPlayed(clock.seconds, trained[-1], len(self._tokenizer(text)["input_ids"]))

    def processes(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None:
        self._folder.cleanup()
