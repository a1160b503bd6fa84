"""Answers and what was spent on them, in an SQLite file that several processes may have open at once.

It has a rollback journal, not a write-ahead log: that one needs memory which all its processes share, and breaks on the
network file systems where runs of several machines are kept.

All statements run in a thread of their own, off the event loop. Whatever comes while that thread is busy is committed
together, as a commit waits for the disk (about 10 ms).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

APPLICATION_ID = 0x6E656730  # tells our files from everybody else's; the last byte counts formats
LONGEST_LOCK_S = 60.0  # for another process to finish what it writes

TABLES = """
CREATE TABLE answers (key TEXT PRIMARY KEY, name TEXT, version TEXT, text TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE usage (calls INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER, cost REAL);
INSERT INTO usage VALUES (0, 0, 0, 0.0);
"""

T = TypeVar("T")
Operation = Callable[[sqlite3.Connection], Any]


@dataclass(frozen=True, slots=True)
class Usage:
    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    calls: int | None
    tokens: int | None
    cost: float | None

    @property
    def limited(self) -> bool:
        return (self.calls, self.tokens, self.cost) != (None, None, None)

    def spent(self, usage: Usage) -> str | None:
        """What is spent, in words; None as long as something is left."""
        tokens = usage.prompt_tokens + usage.completion_tokens
        if self.calls is not None and usage.calls >= self.calls:
            return f"{usage.calls:,} of {self.calls:,} calls (max_calls)"
        if self.tokens is not None and tokens >= self.tokens:
            return f"{tokens:,} of {self.tokens:,} tokens (max_tokens)"
        if self.cost is not None and usage.cost >= self.cost:
            return f"{usage.cost:.4g} of {self.cost:.4g} (max_cost)"
        return None


class Store:
    """For use within one event loop. `path` None: in memory, and gone with it.

    Raises ValueError if the file is damaged, is something else, or cannot be written (`read_only`: is not there).
    """

    def __init__(self, path: Path | None, read_only: bool = False) -> None:
        self._connection = _connect(path, read_only)
        self._path = path
        self._thread = ThreadPoolExecutor(1, "answers")
        self._waiting: list[tuple[Operation, bool, asyncio.Future[Any]]] = []
        self._busy = False

    def find(self, key: str) -> asyncio.Future[str | None]:
        def find(connection: sqlite3.Connection) -> str | None:
            row = connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
            return row[0] if row else None

        return self._submit(find, writes=False)

    def keep(self, key: str, name: str, version: str, text: str, unreadable: str | None) -> asyncio.Future[str]:
        """Keeps an answer unless another process was faster; returns the one that is kept.

        `unreadable` is an answer that is there and no longer understood: it is replaced.
        """

        def keep(connection: sqlite3.Connection) -> str:
            connection.execute(
                "INSERT INTO answers VALUES (?, ?, ?, ?) "
                "ON CONFLICT (key) DO UPDATE SET text = excluded.text WHERE text = ?",
                (key, name, version, text, unreadable),
            )
            kept: str = connection.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()[0]
            return kept

        return self._submit(keep, writes=True)

    def count(self, name: str, version: str) -> asyncio.Future[int]:
        """Answers of a model to a wording."""

        def count(connection: sqlite3.Connection) -> int:
            query = "SELECT count(*) FROM answers WHERE name = ? AND version = ?"
            number: int = connection.execute(query, (name, version)).fetchone()[0]
            return number

        return self._submit(count, writes=False)

    def charge(self, budget: Budget, usage: Usage) -> asyncio.Future[str | None]:
        """Adds `usage` if anything of the budget is left; what is spent, if not."""

        def charge(connection: sqlite3.Connection) -> str | None:
            spent = budget.spent(_usage(connection))
            if spent is None:
                _add(connection, usage)
            return spent

        return self._submit(charge, writes=True)

    def add(self, usage: Usage) -> None:
        """Without waiting: whatever is called later sees it."""
        self._submit(lambda connection: _add(connection, usage), writes=True)

    def usage(self) -> asyncio.Future[Usage]:
        return self._submit(_usage, writes=False)

    async def close(self) -> None:
        await self.usage()  # comes after everything that is still waiting
        self._thread.shutdown()
        self._connection.close()

    def _submit(self, operation: Callable[[sqlite3.Connection], T], writes: bool) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((operation, writes, future))
        if not self._busy:
            self._start()
        return future

    def _start(self) -> None:
        batch, self._waiting = self._waiting, []
        self._busy = True
        operations = [operation for operation, _, _ in batch]
        begin = "BEGIN IMMEDIATE" if any(writes for _, writes, _ in batch) else "BEGIN"
        job = asyncio.get_running_loop().run_in_executor(self._thread, self._run, begin, operations)

        def finish(job: asyncio.Future[list[Any]]) -> None:
            error = job.exception()
            for number, (_, _, future) in enumerate(batch):
                if future.cancelled():
                    continue
                if error is None:
                    future.set_result(job.result()[number])
                else:
                    future.set_exception(error)
            self._busy = False
            if self._waiting:
                self._start()

        job.add_done_callback(finish)

    def _run(self, begin: str, operations: list[Operation]) -> list[Any]:
        try:
            with self._connection:  # commits, or takes everything back
                self._connection.execute(begin)
                return [operation(self._connection) for operation in operations]
        except sqlite3.Error as error:
            raise RuntimeError(f"the answers in {self._path} cannot be used any more: {error}") from error


def _usage(connection: sqlite3.Connection) -> Usage:
    return Usage(*connection.execute("SELECT * FROM usage").fetchone())


def _add(connection: sqlite3.Connection, usage: Usage) -> None:
    connection.execute(
        "UPDATE usage SET calls = calls + ?, prompt_tokens = prompt_tokens + ?, "
        "completion_tokens = completion_tokens + ?, cost = cost + ?",
        (usage.calls, usage.prompt_tokens, usage.completion_tokens, usage.cost),
    )


def _connect(path: Path | None, read_only: bool) -> sqlite3.Connection:
    if read_only and path and not path.is_file():
        raise ValueError(f"there are no recorded answers at {path}: run once without replay to record them")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    where = f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}" if path else "file::memory:"
    connection = None
    try:
        connection = sqlite3.connect(
            where, uri=True, timeout=LONGEST_LOCK_S, isolation_level=None, check_same_thread=False
        )
        if not read_only:
            _create(connection)
        if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
            raise ValueError(f"{path} holds something else than answers: name another file")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict.splitlines()[0])
    except (sqlite3.Error, ValueError) as error:
        if connection:
            connection.close()
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{path} cannot be used for answers ({error}): remove it or name another file") from None
    return connection


def _create(connection: sqlite3.Connection) -> None:
    """Makes the tables of an empty file. Processes that start together do so one after the other."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in TABLES.split(";")[:-1]:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
