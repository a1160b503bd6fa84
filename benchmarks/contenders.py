"""Who takes part in the rollout benchmark, each in a process of its own, so that its memory can be told.

    embedded   `EmbeddedEngine` in this project's settings, prefixes warmed as `negotiator.rollout` does
    sglang     `SGLangEngine` over a server of its own, as the trainer starts it; prefixes warmed in the same way
    hf         Hugging Face `generate`; `hf-shared` computes prefixes once. See `benchmarks.hf_generate`

An engine's round begins as a step of training does, with new weights and nothing cached; what that takes, repacking
included, is told apart from the round (`update_seconds`). Prefill and decoding are what the embedded engine counts
them to be; for Hugging Face and SGLang prefill lasts until the first token, SGLang's in a round of one token each.

Memory is the most that was resident during a round, weights, Python and libraries included; of SGLang the server's
processes count, pages that they share in each of them, and not the client. On a GPU it is what torch had allocated at
most; SGLang's is not told there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import psutil
import torch

from benchmarks.hf_generate import TRIAL_STEPS, HuggingFace
from benchmarks.workload import Shape, Workload
from negotiator.config import EngineConfig
from negotiator.engines.base import Engine
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.engines.sglang import SGLangEngine
from negotiator.engines.sglang_server import ServerSettings
from negotiator.models import load_model
from negotiator.types import SamplingParams

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
START_S, ANSWER_S, END_S = 600.0, 1200.0, 90.0  # longest waits for a process
DOT_S = 5.0  # between two signs of life while one is waited for


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

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


class Player(Protocol):
    about: str

    def play(self, workload: Workload, limit_s: float) -> Played:
        """A round; one that would take longer than `limit_s` may be estimated."""
        ...

    def processes(self) -> list[psutil.Process]:
        """Whose memory is its memory."""
        ...

    def close(self) -> None: ...


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

    def processes(self) -> list[psutil.Process]:
        own = psutil.Process()
        return own.children(recursive=True) if self._remote else [own]

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

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process()]

    def close(self) -> None: ...


# -- processes ---------------------------------------------------------------------------------------------------------


class Failed(NamedTuple):
    why: str


class Worker:
    """A contender's process, from its start to `close`. After a Failed it is of no more use."""

    def __init__(self, contender: Contender, place: Place, warm_up: Workload) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, contender, place, warm_up), daemon=True)
        self._process.start()
        theirs.close()

    def about(self) -> str | Failed:
        """What it is, once it is ready."""
        about: str | Failed = self._answer(START_S, "was not ready")
        return about

    def play(self, workload: Workload, limit_s: float) -> Played | Failed:
        with contextlib.suppress(BrokenPipeError):  # it died in between; reading tells
            self._connection.send((workload, limit_s))
        played: Played | Failed = self._answer(ANSWER_S, "had not ended its round")
        return played

    def close(self) -> None:
        """Returns when it has ended."""
        self._connection.close()
        self._process.join(END_S)
        self._process.kill()

    def _answer(self, limit_s: float, what: str) -> Any:
        started = time.monotonic()
        while not self._connection.poll(DOT_S):
            print(".", end="", flush=True)
            if time.monotonic() - started > limit_s:
                self._process.kill()
                return Failed(f"it {what} after {limit_s:.0f} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join(END_S)
            return Failed(f"its process ended with exit code {self._process.exitcode}")


def _serve(connection: Connection, contender: Contender, place: Place, warm_up: Workload) -> None:
    """The process: a round for each request, until the other side is closed."""
    try:
        player: Player = (HuggingFacePlayer if contender.engine.startswith("hf") else EnginePlayer)(contender, place)
        player.play(warm_up, ANSWER_S)
        connection.send(player.about)
        while (request := _next(connection)) is not None:
            connection.send(_watched(player, place.device, *request))
        player.close()
    except Exception as error:  # one that breaks on a machine must not end everybody's run
        connection.send(Failed(f"{type(error).__name__}: {error}".partition("\n")[0]))


def _next(connection: Connection) -> tuple[Workload, float] | None:
    try:
        request: tuple[Workload, float] = connection.recv()
    except EOFError:
        return None
    return request


def _watched(player: Player, device: torch.device, workload: Workload, limit_s: float) -> Played:
    """A round with its memory."""
    if device.type == "cuda":
        player.play(workload, limit_s)  # kernels are chosen, and graphs recorded, by the size of the problem
        torch.cuda.reset_peak_memory_stats()
        played = player.play(workload, limit_s)
        remote = psutil.Process() not in player.processes()
        return played._replace(peak_bytes=None if remote else torch.cuda.max_memory_allocated())
    ctypes.CDLL(None).malloc_trim(0)
    folders = [Path("/proc") / str(process.pid) for process in player.processes()]
    for folder in folders:
        (folder / "clear_refs").write_text("5")  # the peak starts again from here
    played = player.play(workload, limit_s)
    return played._replace(peak_bytes=sum(map(_peak_bytes, folders)))


def _peak_bytes(process: Path) -> int:
    (line,) = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
