"""What is asked of an endpoint, what that took, and how it fails."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Request:
    """One chat completion."""

    name: str  # the model
    system: str
    user: str
    version: str  # of the wording; part of the cache's key
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 512
    seed: int = 0  # several votes or samples differ in it
    schema: Mapping[str, Any] | None = None  # JSON schema of a structured answer

    def key(self) -> str:
        """Equal exactly for requests that may share an answer."""
        parts = (
            *(self.version, self.name, self.system, self.user),
            *(float(self.temperature), float(self.top_p), self.max_tokens, self.seed, self.schema),
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def prompt_tokens(self) -> int:
        """A guess, good enough to reserve what the answer's own count then corrects."""
        return (len(self.system.encode()) + len(self.user.encode())) // 4 + 1


@dataclass(slots=True)
class EndpointStats:
    """Running totals of this process. Tokens of requests whose answer never came are a guess."""

    calls: int = 0  # requests sent, further tries and hedges among them
    cached: int = 0  # answers that took no call of their own
    retried: int = 0
    hedged: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0  # in the currency of the prices


class Unanswered(Exception):
    """No usable answer: str() says why, in one line."""


class BudgetSpent(RuntimeError):
    """The calls, tokens or money of the run are spent: nothing further is sent."""
