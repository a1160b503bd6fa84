"""Who takes part in the rollout benchmark, each in a process of its own, so that its memory can be told.

    embedded   `EmbeddedEngine` in this project's settings, prefixes warmed as `negotiator.rollout` does
    sglang     `SGLangEngine` over a server of its own, as the trainer starts it; prefixes warmed in the same way
    hf         Hugging Face `generate`; `hf-shared` computes prefixes once. See `benchmarks.hf_generate`

An engine's round begins as a step of training does, with new weights and nothing cached; what that takes, repacking
included, is told apart from the round (`update_seconds`). Prefill and decoding are what the embedded engine counts
them to be; for Hugging Face and SGLang prefill lasts until the first token, SGLang's in a round of one token each.

Of SGLang's memory the server's processes count, pages that they share in each of them, and not the client; on a GPU it
is not told. What else memory means: `benchmarks.processes`.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
import torch

from benchmarks.hf_generate import TRIAL_STEPS, HuggingFace
from benchmarks.processes import Player
from benchmarks.workload import Shape, Workload
from negotiator.config import EngineConfig
from negotiator.engines.base import Engine
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.engines.sglang import SGLangEngine
from negotiator.engines.sglang_server import ServerSettings
from negotiator.models import load_model
from negotiator.types import SamplingParams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Contender(NamedTuple):
    engine: Literal["embedded", "sglang", "hf", "hf-shared"]
    dtype: Literal["fp32", "bf16"]

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.dtype}"


class Place(NamedTuple):
    """On what it runs, and for what sizes."""

    model: Path
    device: torch.device
    config: EngineConfig


class Played(NamedTuple):
    """One round."""

    seconds: float
    prefill_seconds: float
    decode_seconds: float
    new_tokens: int
    prompt_tokens: int  # prefixes that were warmed, and prompts
    cached_tokens: int  # of those, not computed again
    update_seconds: float | None = None
    peak_bytes: int | None = None
    estimated_from: str = ""  # empty: measured

    def __str__(self) -> str:
        how = ", estimated" if self.estimated_from else ""
        return f"{self.tokens_per_s:,.1f} tokens/s, {self.seconds:,.1f} s{how}"

    @property
    def cost(self) -> float:
        return math.inf if self.estimated_from else self.seconds + (self.update_seconds or 0)

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


class EnginePlayer:
    """An engine of this project, through the contract of `engines.base` alone."""

    def __init__(self, contender: Contender, place: Place) -> None:
        self._runner = asyncio.Runner()
        self._folder = tempfile.TemporaryDirectory()
        self._remote = contender.engine == "sglang"
        self._to_first_token: dict[Shape, float] = {}
        model = load_model(place.model, place.device, DTYPES[contender.dtype]).requires_grad_(False)
        self._weights = list(model.named_parameters())
        self._version = 0
        self._engine: Engine
        if self._remote:
            settings, same_gpu = _server(contender, place), place.device.type == "cuda"
            self._engine = SGLangEngine([settings], place.config, Path(self._folder.name), same_gpu)
            self.about = "a server of its own"
        else:
            engine = EmbeddedEngine(model, place.config)
            self._engine, self.about = engine, engine.path

    def play(self, workload: Workload, limit_s: float) -> Played:
        return self._runner.run(self._play(workload))

    def processes(self) -> list[int]:
        own = psutil.Process()
        return [process.pid for process in (own.children(recursive=True) if self._remote else [own])]

    def close(self) -> None:
        self._runner.run(self._engine.close())
        self._runner.close()
        self._folder.cleanup()

    async def _play(self, workload: Workload) -> Played:
        if not self._remote:
            return await self._round(workload)
        shape = workload.shape
        if shape not in self._to_first_token:
            one_token_each = workload._replace(shape=shape._replace(new_tokens=1))
            self._to_first_token[shape] = (await self._round(one_token_each)).seconds
        played = await self._round(workload)
        prefill = min(self._to_first_token[shape], played.seconds)
        return played._replace(prefill_seconds=prefill, decode_seconds=played.seconds - prefill)

    async def _round(self, workload: Workload) -> Played:
        engine = self._engine
        started = time.perf_counter()
        self._version += 1
        await engine.update_weights(self._weights, self._version)
        other = 0 if workload.prompts[0][0] else 1  # no prompt begins with it
        await engine.generate([other], SamplingParams(max_tokens=1))  # new weights may be made ready by their first use
        update = time.perf_counter() - started

        before, started = engine.stats(), time.perf_counter()
        for prefix in workload.prefixes:
            await engine.warm(prefix)
        calls = (engine.generate(ids, workload.sampling(i)) for i, ids in enumerate(workload.prompts))
        generations = await asyncio.gather(*calls)
        seconds, stats = time.perf_counter() - started, engine.stats().since(before)
        assert {len(g.ids) for g in generations} == {workload.shape.new_tokens}, "a text ended early"
        return Played(
            seconds,
            stats.prefill_seconds,
            stats.decode_seconds,
            stats.generated_tokens,
            stats.prompt_tokens,
            stats.cached_prompt_tokens,
            update,
        )


def _server(contender: Contender, place: Place) -> ServerSettings:
    return ServerSettings(
        python=place.config.python,
        model=place.model,
        dtype="float32" if contender.dtype == "fp32" else "bfloat16",
        device="cuda" if place.device.type == "cuda" else "cpu",
        gpus=(0,) if place.device.type == "cuda" else (),
        max_total_tokens=place.config.cache_tokens,
        max_running=place.config.max_running,
        prefill_tokens=place.config.prefill_tokens,
    )


class HuggingFacePlayer:
    def __init__(self, contender: Contender, place: Place) -> None:
        self._shares = contender.engine == "hf-shared"
        self._model = HuggingFace(place.model, place.device, DTYPES[contender.dtype], self._shares)
        self.about = "one batch, fused attention" + ", prefixes computed once" * self._shares

    def play(self, workload: Workload, limit_s: float) -> Played:
        shape = workload.shape
        expected = (0.0, 0.0) if self._shares else self._model.expected(workload)
        estimated = sum(expected) > limit_s
        prefill, decode = expected if estimated else self._model.generate(workload)
        warmed = shape.scenarios * shape.prefix if self._shares else 0
        return Played(
            prefill + decode,
            prefill,
            decode,
            shape.dialogues * shape.new_tokens,
            warmed + sum(map(len, workload.prompts)),
            shape.dialogues * shape.prefix if self._shares else 0,
            estimated_from=f"one prompt and {TRIAL_STEPS} steps of all" if estimated else "",
        )

    def processes(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None: ...


def make_player(contender: Contender, place: Place) -> Player:
    return (HuggingFacePlayer if contender.engine.startswith("hf") else EnginePlayer)(contender, place)
