"""What an item of each kind consists of: as a model writes it (a draft), and as a line of a file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from negotiator.data import SHIPPED, Record, read_records
from negotiator.prompts.wording import one_line
from negotiator.seeds import derive_seed

Kind = Literal["dilemmas", "personas", "eval_conflict", "eval_open"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Draft = Mapping[str, str]  # the fields of `LENGTHS[kind]`

_SITUATION = (40, 130)
_NAME = (1, 6)
LENGTHS: Mapping[Kind, Mapping[str, tuple[int, int]]] = {
    # Fewest and most words of each field that a model writes: what the shipped items have, with some room.
    "dilemmas": {"text": _SITUATION},
    "personas": {
        "tension": (3, 14),
        "name_a": _NAME,
        "persona_a": (40, 90),
        "name_b": _NAME,
        "persona_b": (40, 90),
    },
    "eval_conflict": {
        "text": _SITUATION,
        "name_a": _NAME,
        "persona_a": (18, 65),
        "name_b": _NAME,
        "persona_b": (18, 65),
    },
    "eval_open": {"text": (15, 90)},
}
PASSAGES = ("text", "persona_a", "persona_b")  # fields that are whole sentences


@dataclass(frozen=True, slots=True)
class Cell:
    """What an item is to be about. Open questions have a topic, which is their domain, and no category."""

    category: str
    domain: str

    def __str__(self) -> str:
        return f"{self.category}: {self.domain}" if self.category else self.domain


@dataclass(frozen=True, slots=True)
class Example:
    """A shipped item to show to the model. `subject` is what it is about, in the fewest words there are."""

    category: str
    subject: str
    draft: Draft


def cells(kind: Kind) -> list[Cell]:
    """All cells in the order in which they get their items; any number of the first ones is as balanced as it can be.

    Persona pairs have no domain of their own: there it says in which field the tension is to show.
    """
    if kind == "eval_open":
        return [Cell("", topic) for topic in sorted({r.text("topic") for r in read_records(SHIPPED["eval_open"])})]
    domains: defaultdict[str, set[str]] = defaultdict(set)
    for record in read_records(SHIPPED["dilemmas"]):
        domains[record.text("category")].add(record.text("domain"))
    placed = [
        ((place + 0.5) / len(own), Cell(category, domain))
        for category, own in domains.items()
        for place, domain in enumerate(sorted(own, key=lambda domain: derive_seed("domain", domain)))
    ]
    return [cell for _, cell in sorted(placed, key=lambda p: (p[0], p[1].category))]


def examples(kind: Kind) -> list[Example]:
    """The shipped items of this kind."""
    shipped = []
    for record in read_records(SHIPPED[kind]):
        category = record.text("category", default="")
        fields = ("domain", "topic", "tension", "category")
        subject = next(record.text(field) for field in fields if field in record.fields)
        shipped.append(Example(category, subject, draft_of(kind, record)))
    return shipped


def draft_of(kind: Kind, record: Record) -> Draft:
    """The fields of a line that a model would have written. Raises ValueError naming file, line and field."""
    draft = {}
    for field in LENGTHS[kind]:
        part, _, side = field.partition("_")
        if side:
            party = record.persona(side)
            draft[field] = party.name if part == "name" else party.text
        else:
            draft[field] = record.text(field)
    return draft


def line_of(kind: Kind, draft: Draft, cell: Cell) -> dict[str, Any]:
    """The line of a draft, without its id and source."""
    about: dict[str, Any] = {"category": cell.category, "domain": cell.domain}
    if kind == "personas":
        about = {"tension": draft["tension"]}
    elif kind == "eval_open":
        about = {"topic": cell.domain}
    if "text" in draft:
        about["text"] = draft["text"]
    if "persona_a" in draft:
        about |= {side: {"name": draft[f"name_{side}"], "persona": draft[f"persona_{side}"]} for side in ("a", "b")}
    return about


def json_schema(kind: Kind) -> dict[str, Any]:
    fields = list(LENGTHS[kind])
    return {
        "type": "object",
        "properties": {field: {"type": "string"} for field in fields},
        "required": fields,
        "additionalProperties": False,
    }


def from_json(kind: Kind, answer: str) -> Draft | None:
    """The draft in an answer that may wrap its JSON in words; None if there is none, or a field is missing or empty."""
    try:
        fields = json.loads(answer[answer.find("{") : answer.rfind("}") + 1])
    except (json.JSONDecodeError, RecursionError):
        return None
    return _complete(kind, [fields.get(field) for field in LENGTHS[kind]] if isinstance(fields, dict) else [])


def to_plain(draft: Draft) -> str:
    """What a small model can imitate: tension and text a line each, and a line "name: persona" for each party."""
    lines = [draft[field] for field in ("tension", "text") if field in draft]
    return "\n".join(lines + [f"{draft[f'name_{s}']}: {draft[f'persona_{s}']}" for s in "ab" if f"name_{s}" in draft])


def from_plain(kind: Kind, answer: str) -> Draft | None:
    """Reads what `to_plain` writes; None if it has other lines than that."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if "persona_a" not in LENGTHS[kind]:
        return _complete(kind, [" ".join(lines)])
    if len(lines) != 3:
        return None
    parties = [part for line in lines[1:] for part in line.split(":", 1)]
    return _complete(kind, [lines[0], *parties])


def _complete(kind: Kind, values: Sequence[object]) -> Draft | None:
    fields = list(LENGTHS[kind])
    texts = [one_line(value) for value in values if isinstance(value, str)]
    return dict(zip(fields, texts, strict=True)) if len(texts) == len(values) == len(fields) and all(texts) else None
