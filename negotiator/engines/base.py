"""The one contract between the negotiation and whatever generates its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch

from negotiator.types import Generation, SamplingParams


@dataclass(slots=True)
class EngineStats:
    """Running totals since the engine was built; `train` reports their differences over a step."""

    prompt_tokens: int = 0  # of finished requests, cached or not
    cached_prompt_tokens: int = 0  # of those, reused from the prefix cache
    reusable_prompt_tokens: int = 0  # what a perfect cache would have reused; see `engines.reuse`
    generated_tokens: int = 0
    forward_passes: int = 0
    prefill_seconds: float = 0.0  # time in forward passes, shared between prefill and decode by their tokens
    decode_seconds: float = 0.0

    @property
    def cached_fraction_of_ideal(self) -> float | None:
        """None where there was nothing to reuse."""
        return self.cached_prompt_tokens / self.reusable_prompt_tokens if self.reusable_prompt_tokens else None

    def since(self, earlier: EngineStats) -> EngineStats:
        """What was added after `earlier` was taken."""
        return EngineStats(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))

    @staticmethod
    def of_processes(stats: Sequence[EngineStats]) -> EngineStats:
        """Of engines side by side: counts are added up, seconds averaged."""
        sums = EngineStats(*(sum(getattr(s, f.name) for s in stats) for f in fields(EngineStats)))
        return replace(
            sums, prefill_seconds=sums.prefill_seconds / len(stats), decode_seconds=sums.decode_seconds / len(stats)
        )


class Engine(Protocol):
    """Generates under the current policy weights. Every method but `stats` may be awaited by many dialogues at once."""

    path: str  # what computes, in a few words

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Samples a continuation of `prompt_ids`.

        Raises ValueError if prompt and `max_tokens` do not fit the model's context or the cache.
        """
        ...

    async def next_logprobs(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs (temperature 1, whole vocabulary) of each of `token_ids` as the token after `prompt_ids`."""
        ...

    async def warm(self, prefix_ids: Sequence[int]) -> None:
        """Puts a prefix into the cache, so that requests sent together afterwards all share it."""
        ...

    async def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Serves new weights, and drops every key and value of the old ones. Nothing may be running."""
        ...

    async def release(self) -> None:
        """Lends the trainer what memory it can until the next `update_weights`. Nothing may be running."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot of the totals."""
        ...

    async def close(self) -> None: ...


class LeadersEngine:
    """An `Engine` for a process that leaves all generation to the leader, who has the servers."""

    path = "the leader's servers"

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        raise AssertionError("only the leader generates")

    async def next_logprobs(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        raise AssertionError("only the leader generates")

    async def warm(self, prefix_ids: Sequence[int]) -> None: ...

    async def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None: ...

    async def release(self) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats()

    async def close(self) -> None: ...
