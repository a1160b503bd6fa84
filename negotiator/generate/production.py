"""From empty slots to a file of items, one try after the other, so that a later run goes on where this one ended.

Slot s belongs to cell s modulo the number of cells: with all slots filled no cell has more than its share. A try is one
answer of the model, with a seed of its own. An item that is kept is a line of FILE, a refused answer one of
FILE.refused.jsonl, with the reason; both are written at once, and what both hold is all that a later run needs.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from negotiator.data import read_records
from negotiator.endpoint import Unanswered
from negotiator.generate.filters import fields_of, refusal, shipped_texts
from negotiator.generate.items import LENGTHS, Cell, Example, Kind, cells, draft_of, examples, line_of
from negotiator.generate.writers import Task, Writer
from negotiator.seeds import derive_seed

EXAMPLES = 3  # shown with each task
MOST_SILENT = 10  # tries in a row without an answer, after which nobody is asked any more
SEEDS = 2**32  # some servers take no larger ones


class LinesFile:
    """A JSONL file that this process alone appends to. A last line that was cut short is taken away.

    Raises ValueError if another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - open, and locked, as long as this lives
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {path}: wait for it, or choose another file") from None
        self._file.seek(0)
        held = self._file.read()
        last = held[held.rfind(b"\n") + 1 :]
        self.torn = bool(last) and not _is_json(last)
        if self.torn:
            self._file.truncate(len(held) - len(last))
        elif last:
            self._file.write(b"\n")
            self._file.flush()
        self.empty = not (held[: -len(last)] if self.torn else held).strip()

    def append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Shelf:
    """What is kept and what was refused so far, in memory and in the files.

    Raises ValueError if a file cannot be read, or holds something that this command did not write.
    """

    def __init__(self, kind: Kind, path: Path) -> None:
        self._items, self._refusals = LinesFile(path), LinesFile(refused_path(path))
        self.torn = [p for p, f in ((path, self._items), (refused_path(path), self._refusals)) if f.torn]
        self.kept: set[int] = set()  # slots
        self.refused: Counter[str] = Counter()  # by reason
        self.known = shipped_texts()
        self._tries: Counter[tuple[int, str]] = Counter()  # refused so far, by slot and who wrote
        if not self._items.empty:
            for record in read_records(path):
                source = record.fields.get("source")
                if (
                    not isinstance(source, dict)
                    or source.get("kind") != kind
                    or not isinstance(source.get("slot"), int)
                ):
                    raise ValueError(f"{record.where}: not written by this command for {kind}: choose another file")
                draft_of(kind, record)
                self._keep(source["slot"], record.fields)
        if not self._refusals.empty:
            for number, raw in enumerate(refused_path(path).read_bytes().splitlines(), start=1):
                try:
                    line = json.loads(raw)
                    self._refuse(line["slot"], line["by"], line["reason"])
                except (ValueError, LookupError, TypeError):
                    raise ValueError(f"{refused_path(path)}:{number}: not a refusal: move the file away") from None

    def tries(self, slot: int, by: str) -> int:
        return self._tries[slot, by]

    def keep(self, slot: int, line: dict[str, Any]) -> None:
        self._items.append(line)
        self._keep(slot, line)

    def refuse(self, slot: int, by: str, reason: str, answer: str) -> None:
        self._refusals.append({"slot": slot, "by": by, "reason": reason, "answer": answer})
        self._refuse(slot, by, reason)

    def close(self) -> None:
        self._items.close()
        self._refusals.close()

    def _keep(self, slot: int, line: dict[str, Any]) -> None:
        self.kept.add(slot)
        self.known.add(fields_of(line))

    def _refuse(self, slot: int, by: str, reason: str) -> None:
        self._tries[slot, by] += 1
        self.refused[reason] += 1


@dataclass(slots=True)
class Production:
    """`count` items of a kind, and how far they are."""

    kind: Kind
    count: int
    seed: int
    tries: int  # most for each item
    temperature: float
    writer: Writer
    shelf: Shelf
    changed: Callable[[], None] = lambda: None  # called after every try
    unanswered: int = 0  # tries of this run without an answer
    stopped: str | None = None  # why nobody is asked any more
    _silent: int = 0
    _cells: list[Cell] = field(init=False)
    _examples: list[Example] = field(init=False)
    _by: str = field(init=False)

    def __post_init__(self) -> None:
        self._cells, self._examples = cells(self.kind), examples(self.kind)
        # Whoever has refused tries behind it starts afresh with another seed, model or wording.
        self._by = f"{self.writer.name}, prompt {self.writer.version(self.kind)}, seed {self.seed}"

    @property
    def kept(self) -> int:
        return sum(slot < self.count for slot in self.shelf.kept)

    @property
    def given_up(self) -> int:
        """Slots that stay empty after all their tries."""
        return sum(self.shelf.tries(slot, self._by) >= self.tries for slot in self._open())

    def cells(self) -> dict[Cell, tuple[int, int]]:
        """(items it has, its share) of each cell that gets any."""
        share = Counter(self._cell(slot) for slot in range(self.count))
        have = Counter(self._cell(slot) for slot in self.shelf.kept if slot < self.count)
        return {cell: (have[cell], share[cell]) for cell in share}

    async def run(self) -> None:
        """Tries until every slot is filled or given up, or there is no sense in going on (`stopped`)."""
        slots = iter(self._open())

        async def work() -> None:
            for slot in slots:
                await self._fill(slot)

        await asyncio.gather(*(work() for _ in range(self.writer.at_once)))

    def _cell(self, slot: int) -> Cell:
        return self._cells[slot % len(self._cells)]

    def _open(self) -> list[int]:
        return [slot for slot in range(self.count) if slot not in self.shelf.kept]

    async def _fill(self, slot: int) -> None:
        silent = 0
        while slot not in self.shelf.kept and not self.stopped:
            number = self.shelf.tries(slot, self._by) + silent
            if number >= self.tries:
                return
            if not await self._try(slot, number):
                silent += 1
            self.changed()

    async def _try(self, slot: int, number: int) -> bool:
        """Whether there was an answer."""
        cell = self._cell(slot)
        seed = derive_seed(self.seed, self.kind, slot, number) % SEEDS
        task = Task(self.kind, cell, self._shown(cell, seed), seed, self.temperature)
        try:
            answer = await self.writer.write(task)
        except Unanswered as why:
            self.unanswered += 1
            self._silent += 1
            if self._silent >= MOST_SILENT:
                self.stopped = f"{self._silent} tries in a row without an answer; the last one: {why}"
            return False
        except RuntimeError as why:  # the budget is spent, the key is wrong: no further try can help
            self.stopped = str(why)
            return False
        self._silent = 0
        draft = self.writer.read(self.kind, answer)
        reason = refusal(self.kind, draft, [example.draft for example in task.examples], self.shelf.known)
        if reason is not None:
            self.shelf.refuse(slot, self._by, reason, answer)
            return True
        assert draft is not None and draft.keys() == LENGTHS[self.kind].keys(), "what cannot be read is refused"
        source = {
            "kind": self.kind,
            "model": self.writer.name,
            "prompt": self.writer.version(self.kind),
            "seed": seed,
            "temperature": self.temperature,
            "date": datetime.now(UTC).date().isoformat(),
            "cell": [cell.category, cell.domain],
            "slot": slot,
        }
        name = f"{self.kind}-{self.seed}-{slot:05d}"
        self.shelf.keep(slot, {"id": name, **line_of(self.kind, draft, cell), "source": source})
        return True

    def _shown(self, cell: Cell, seed: int) -> list[Example]:
        """Examples of the cell's category, where the shipped items have one."""
        of_category = [e for e in self._examples if e.category in ("", cell.category)]
        return sorted(of_category, key=lambda e: derive_seed(seed, "example", *e.draft.values()))[:EXAMPLES]


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def refused_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.refused.jsonl")


def answers_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.answers.sqlite")
