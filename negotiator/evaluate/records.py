"""What an evaluation has done so far, kept item by item: whoever goes on does only what is missing.

runs/evaluation-<A>-<B>/settings.json       what decides its results
                        texts.jsonl         an item, as a policy has negotiated or answered it
                        comparisons.jsonl   a pair of those, as the judge has compared them
                        general.jsonl       a policy's figures in a task of lm-evaluation-harness
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from negotiator.evaluate.policies import Side
from negotiator.judges.base import Criterion

Mode = Literal["greedy", "sampled"]
MODES: tuple[Mode, Mode] = ("greedy", "sampled")
ItemSet = Literal["conflict", "open"]
Outcome = Literal["A", "B", "tie", "inconsistent", "failed"]

TextKey = tuple[Side, Mode, ItemSet, str]
PairKey = tuple[Mode, ItemSet, str, Criterion]


@dataclass(frozen=True, slots=True)
class Text:
    """What one policy made of one item. On an open question `completion` is the answer, and nothing is agreed."""

    policy: Side
    mode: Mode
    set: ItemSet
    item: str
    agreed: bool
    failure: str | None  # of a judge; then the item counts nowhere
    rounds: int
    utterances: list[str]
    completion: str | None
    score: float | None  # for Collective Agency, 0 to 5

    @property
    def key(self) -> TextKey:
        return self.policy, self.mode, self.set, self.item


@dataclass(frozen=True, slots=True)
class Comparison:
    """The texts of both policies on one item: who was said to be better when A was shown first, and when B was."""

    mode: Mode
    set: ItemSet
    item: str
    criterion: Criterion
    a_first: Side | Literal["tie"]
    b_first: Side | Literal["tie"]
    identical: bool  # the texts; then nobody was asked
    failure: str | None

    @property
    def key(self) -> PairKey:
        return self.mode, self.set, self.item, self.criterion

    @property
    def outcome(self) -> Outcome:
        if self.failure is not None:
            return "failed"
        return self.a_first if self.a_first == self.b_first else "inconsistent"


@dataclass(frozen=True, slots=True)
class Ability:
    """One figure of one policy in one task of lm-evaluation-harness, over the first `limit` of its items, or all."""

    policy: Side
    task: str
    limit: int | None
    metrics: dict[str, float]
    items: int

    @property
    def key(self) -> tuple[Side, str, int | None]:
        return self.policy, self.task, self.limit


R = TypeVar("R", Text, Comparison, Ability)


class Journal(Generic[R]):
    """A JSONL file with a record a line. Of several records with one key the last one counts."""

    def __init__(self, path: Path, record: Callable[..., R]) -> None:
        """Cuts off what a kill has left of a last line. Raises ValueError for a line that is none of ours."""
        self._file = open(path, "ab+")  # noqa: SIM115 - stays open
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        self.records: dict[Any, R] = {}
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                read = record(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}:{number} is no record of an evaluation ({error}): remove the line") from None
            self.records[read.key] = read

    def add(self, record: R) -> None:
        self.records[record.key] = record
        self._file.write(json.dumps(dataclasses.asdict(record)).encode() + b"\n")
        self._file.flush()


class EvaluationFolder:
    """Holds the folder's lock while it lives. `settings`: what decides the results of this evaluation."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Raises ValueError if somebody else writes there, or if the folder holds another evaluation."""
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._locked = open(path / ".lock", "w")  # noqa: SIM115 - the open file is the lock
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another evaluation is writing to {path}: wait for it, or give another --out") from None
        begun = path / "settings.json"
        settings = json.loads(json.dumps(settings))  # as they will be read
        if not begun.exists():
            write_atomically(begun, json.dumps(settings, indent=2) + "\n")
        elif differing := differences(json.loads(begun.read_text()), settings):
            raise ValueError(
                f"{path} holds an evaluation with another {differing[0]}: give another --out, or go on with the "
                f"settings in {begun}"
            )
        self.texts = Journal(path / "texts.jsonl", Text)
        self.comparisons = Journal(path / "comparisons.jsonl", Comparison)
        self.abilities = Journal(path / "general.jsonl", Ability)


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Dotted names of what differs between two trees of settings."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return [] if one == other else [name]
    keys = [*one, *(key for key in other if key not in one)]
    below = [differences(one.get(key), other.get(key), f"{name}.{key}" if name else key) for key in keys]
    return [found for names in below for found in names]


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate must not cost the report
    partial.rename(path)
