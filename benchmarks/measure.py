"""Time and memory of one call, and of many by turns.

Time is the wall clock around the call on the CPU, and between two events on CUDA, with a cold L2 cache. Extra memory is
the peak during the call less what was held before it, so the gradients that a call returns count, for everyone alike.

On the CPU whole calls can take minutes where a machine is slow at something, so every call is first tried on a few
tokens; see `Fit`.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")
CLEAR_REFS = Path("/proc/self/clear_refs")
L2_BYTES = 128 << 20


class Sample(NamedTuple):
    ms: float
    peak_bytes: int | None  # None where this machine does not tell


def sample(call: Callable[[], T], device: torch.device) -> tuple[Sample, T]:
    return _sample_cuda(call) if device.type == "cuda" else _sample_cpu(call)


def _sample_cuda(call: Callable[[], T]) -> tuple[Sample, T]:
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    return Sample(start.elapsed_time(end), torch.cuda.max_memory_allocated() - before), result


def _sample_cpu(call: Callable[[], T]) -> tuple[Sample, T]:
    ctypes.CDLL(None).malloc_trim(
        0
    )  # else memory that an earlier call freed is there already and seems to cost nothing
    tells = CLEAR_REFS.exists()
    if tells:
        CLEAR_REFS.write_text("5")  # the peak starts again from here
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    result = call()
    ms = (time.perf_counter() - start) * 1e3
    return Sample(ms, max(0, _status_bytes("VmHWM") - before) if tells else None), result


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


class Fit(NamedTuple):
    """The time at any number of tokens, on the line through the last two trials: a fixed part, such as a weight
    gradient set to zero, and a part per token. Memory is no such line: what has the peak at few tokens may not at many.
    """

    tokens: list[int]
    ms: list[float]

    def add(self, tokens: int, ms: float) -> None:
        self.tokens.append(tokens)
        self.ms.append(ms)

    def at(self, tokens: int) -> float:
        """Never below the last trial; one trial alone counts as all per token."""
        if len(self.ms) == 1:
            return self.ms[0] * tokens / self.tokens[0]
        slope = (self.ms[-1] - self.ms[-2]) / (self.tokens[-1] - self.tokens[-2])
        return max(self.ms[-1], self.ms[-1] + slope * (tokens - self.tokens[-1]))


class TensorPeak(TorchDispatchMode):
    """Counts the bytes of tensors made under it, also of fake ones; `peak` is the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):  # what was there before may come back as a view
            if isinstance(value, torch.Tensor):
                self._seen.add(value.untyped_storage()._cdata)
        results = func(*args, **(kwargs or {}))
        for value in tree_leaves(results):
            if isinstance(value, torch.Tensor):
                self._hold(value.untyped_storage())
        return results

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.live += count
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._release, key, count)

    def _release(self, key: int, count: int) -> None:
        self._seen.discard(key)
        self.live -= count


def pick(costs: dict[str, float], together: Collection[str], budget: float) -> list[str]:
    """Who has time for another call: all of `together` or none of them, then whoever else, the quickest first."""
    others = sorted((name for name in costs if name not in together), key=costs.__getitem__)
    picked = []
    for group in ([*together], *([name] for name in others)):
        cost = sum(costs[name] for name in group)
        if cost <= budget:
            picked += group
            budget -= cost
    return picked


def rotated(names: list[str], number: int) -> list[str]:
    """The order of a round, each time starting with another one, so that nobody always follows the same neighbour."""
    start = number % len(names) if names else 0
    return names[start:] + names[:start]
