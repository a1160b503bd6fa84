"""Dilemmas, persona pairs and evaluation sets: loading, splitting, and drawing the scenarios of a step.

The shipped files and a user's own have the same format, one JSON object a line:

    dilemmas  {"id": ..., "text": ...}, optionally "category" and "domain"
    personas  {"id": ..., "a": {"name": ..., "persona": ...}, "b": {...}}, optionally "tension"

Everything drawn here is a function of its arguments: no state is kept, so a resumed run needs none restored.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from negotiator.seeds import derive_seed
from negotiator.types import Dilemma, Persona, PersonaPair, Scenario

_HERE = Path(__file__).parent
SHIPPED = {kind: _HERE / f"{kind}.jsonl" for kind in ("dilemmas", "personas", "eval_conflict", "eval_open")}


def load_dilemmas(path: Path | None = None) -> list[Dilemma]:
    """The dilemmas of a JSONL file, the shipped 1,100 when left out. Raises ValueError naming file, line and field."""
    return [
        Dilemma(r.id, r.text("category", default=""), r.text("domain", default=""), r.text("text"))
        for r in read_records(path or SHIPPED["dilemmas"])
    ]


def load_personas(path: Path | None = None) -> list[PersonaPair]:
    """The persona pairs of a JSONL file, the shipped 25 when left out. Raises ValueError like `load_dilemmas`."""
    return [
        PersonaPair(r.id, r.text("tension", default=""), r.persona("a"), r.persona("b"))
        for r in read_records(path or SHIPPED["personas"])
    ]


def load_eval_conflict() -> list[Scenario]:
    """The 100 conflicts for evaluation, each with the two stakeholders written for it. Never trained on."""
    return [
        Scenario(index, Dilemma(r.id, r.text("category"), "", r.text("text")), r.persona("a"), r.persona("b"), r.id)
        for index, r in enumerate(read_records(SHIPPED["eval_conflict"]))
    ]


def load_eval_open() -> list[Dilemma]:
    """The 100 open questions for evaluation, with the topic as their domain. Never trained on."""
    return [Dilemma(r.id, "open", r.text("topic"), r.text("text")) for r in read_records(SHIPPED["eval_open"])]


def split(dilemmas: Sequence[Dilemma], held_out: float) -> tuple[list[Dilemma], list[Dilemma]]:
    """(train, held out), about `held_out` of them in the latter.

    An item's side depends on its id alone, so adding or reordering items moves no other.
    Raises ValueError if nothing is left to train on.
    """
    train: list[Dilemma] = []
    held: list[Dilemma] = []
    for dilemma in dilemmas:
        (held if derive_seed("split", dilemma.id) < held_out * 2**63 else train).append(dilemma)
    if not train:
        raise ValueError(
            f"data.held_out = {held_out} leaves none of the {len(dilemmas)} dilemmas to train on: lower it or add some"
        )
    return train, held


def draw_scenarios(
    dilemmas: Sequence[Dilemma], pairs: Sequence[PersonaPair], seed: int, step: int, count: int
) -> list[Scenario]:
    """The `count` scenarios of a step.

    Steps walk through the dilemmas in an order shuffled anew each epoch, so none repeats within an epoch. The pair,
    and which of the two is agent 1, is drawn for each scenario. `count` must stay the same over the steps of a run.
    """
    orders: dict[int, list[Dilemma]] = {}
    scenarios = []
    for index in range(count):
        epoch, place = divmod(step * count + index, len(dilemmas))
        if epoch not in orders:
            orders[epoch] = _shuffled(dilemmas, seed, epoch)
        pair = pairs[derive_seed(seed, "pair", step, index) % len(pairs)]
        first, second = (pair.a, pair.b) if derive_seed(seed, "first", step, index) % 2 else (pair.b, pair.a)
        scenarios.append(Scenario(index, orders[epoch][place], first, second, pair.id))
    return scenarios


def _shuffled(dilemmas: Sequence[Dilemma], seed: int, epoch: int) -> list[Dilemma]:
    # Sorted by hash, not random.shuffle, whose result may differ between Python versions.
    return sorted(dilemmas, key=lambda d: (derive_seed(seed, "order", epoch, d.id), d.id))


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a file. `where` is "file:line", which begins every message about it."""

    where: str
    fields: dict[str, Any]

    @property
    def id(self) -> str:
        return self.text("id")

    def text(self, name: str, default: str | None = None) -> str:
        return _text(self.where, self.fields, name, name, default)

    def persona(self, side: str) -> Persona:
        party = self.fields.get(side)
        if not isinstance(party, dict):
            raise ValueError(f'{self.where}: field "{side}" must be an object with "name" and "persona"')
        return Persona(
            _text(self.where, party, "name", f"{side}.name"), _text(self.where, party, "persona", f"{side}.persona")
        )


def _text(where: str, fields: dict[str, Any], name: str, shown: str, default: str | None = None) -> str:
    value = fields.get(name, default)
    if value is None and name not in fields:
        raise ValueError(f'{where}: field "{shown}" is missing')
    if not isinstance(value, str):
        raise ValueError(f'{where}: field "{shown}" must be a string, not {json.dumps(value)[:40]}')
    if default is None and not value.strip():
        raise ValueError(f'{where}: field "{shown}" is empty')
    return value.strip()


def read_records(path: Path) -> list[Record]:
    """The lines of a JSONL file, each an object with an id of its own. Raises ValueError naming file and line."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    records: list[Record] = []
    line_of: dict[str, int] = {}
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start + 1})") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error.msg} at character {error.pos + 1})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be a JSON object, one a line")
        record = Record(where, fields)
        if record.id in line_of:
            raise ValueError(f'{where}: id "{record.id}" is already used in line {line_of[record.id]}')
        line_of[record.id] = number
        records.append(record)
    if not records:
        raise ValueError(f"{path}: holds no lines")
    return records
