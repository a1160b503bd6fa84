"""Contenders of a benchmark, each in a process of its own, so that its memory can be told; and their rounds by turns.

Memory is the most that was resident during a round in all processes of a player, weights, Python and libraries
included. On a GPU it is what torch had allocated at most; that of other processes is not told there.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from benchmarks.measure import pick, rotated

START_S, ANSWER_S, END_S = 600.0, 1200.0, 90.0  # longest waits for a process
DOT_S = 5.0  # between two signs of life while one is waited for
MOST_ROUNDS = 5


class Failed(NamedTuple):
    why: str


class Played(Protocol):
    """A round: a NamedTuple that says as text how quick it was, and has a field `peak_bytes` to be filled in."""

    @property
    def cost(self) -> float:
        """Seconds that another one would take."""
        ...


class Player(Protocol):
    """Who takes part."""

    about: str

    def play(self, *request: Any) -> Any:
        """A round, which is a Played."""
        ...

    def processes(self) -> list[int]:
        """Ids of those whose memory is its memory."""
        ...

    def close(self) -> None: ...


class Worker:
    """A player's process, from its start to `close`. `make` runs there. After a Failed it is of no more use."""

    def __init__(self, make: Callable[[], Player], device: torch.device, warm_up: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, device, warm_up), daemon=True)
        self._process.start()
        theirs.close()

    def about(self) -> str | Failed:
        """What it is, once it is ready."""
        about: str | Failed = self._answer(START_S, "was not ready")
        return about

    def play(self, *request: Any) -> Any:
        """What its player returns, or Failed."""
        with contextlib.suppress(BrokenPipeError):  # it died in between; reading tells
            self._connection.send(request)
        return self._answer(ANSWER_S, "had not ended its round")

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


def await_ready(workers: Mapping[str, Worker]) -> dict[str, Failed]:
    """Shows what each of them is; returns those that did not start."""
    failed = {}
    for name, worker in workers.items():
        print(f"  {name}: ", end="", flush=True)
        about = worker.about()
        print(about.why if isinstance(about, Failed) else about, flush=True)
        if isinstance(about, Failed):
            failed[name] = about
    return failed


def play_rounds(
    workers: Mapping[str, Worker], request: tuple[Any, ...], budget_s: float
) -> dict[str, list[Any] | Failed]:
    """Everybody once, then by turns all that fit into what is left of `budget_s`, the quickest first."""
    started = time.monotonic()
    played: dict[str, list[Any]] = {name: [] for name in workers}
    failed: dict[str, Failed] = {}
    names = list(workers)
    for number in range(MOST_ROUNDS):
        for name in rotated(names, number):
            print(f"  round {number + 1}, {name} ... ", end="", flush=True)
            result = workers[name].play(*request)
            if isinstance(result, Failed):
                failed[name] = result
                print(result.why, flush=True)
            else:
                played[name].append(result)
                print(result, flush=True)
        costs = {name: max(p.cost for p in played[name]) for name in names if name not in failed}
        names = pick(costs, (), budget_s - (time.monotonic() - started))
    return {**played, **failed}


def _serve(connection: Connection, make: Callable[[], Player], device: torch.device, warm_up: tuple[Any, ...]) -> None:
    """The process: a round for each request, until the other side is closed."""
    try:
        player = make()
        player.play(*warm_up)
        trim()
        connection.send(player.about)
        while (request := _next(connection)) is not None:
            connection.send(_watched(player, device, *request))
            trim()  # the others need the memory
        player.close()
    except Exception as error:  # one that breaks on a machine must not end everybody's run
        connection.send(Failed(f"{type(error).__name__}: {error}".partition("\n")[0]))


def _next(connection: Connection) -> tuple[Any, ...] | None:
    try:
        request: tuple[Any, ...] = connection.recv()
    except EOFError:
        return None
    return request


def _watched(player: Player, device: torch.device, *request: Any) -> Any:
    """A round with its memory."""
    if device.type == "cuda":
        player.play(*request)  # kernels are chosen, and graphs recorded, by the size of the problem
        torch.cuda.reset_peak_memory_stats()
        played = player.play(*request)
        remote = os.getpid() not in player.processes()
        return played._replace(peak_bytes=None if remote else torch.cuda.max_memory_allocated())
    trim()
    folders = [Path("/proc") / str(process) for process in player.processes()]
    for folder in folders:
        (folder / "clear_refs").write_text("5")  # the peak starts again from here
    return player.play(*request)._replace(peak_bytes=sum(map(_peak_bytes, folders)))


def trim() -> None:
    """Gives the system what was freed."""
    ctypes.CDLL(None).malloc_trim(0)


def _peak_bytes(process: Path) -> int:
    (line,) = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024
