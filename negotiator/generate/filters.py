"""Why a draft is refused. What is kept differs from everything shipped and written, and looks like a shipped item.

None of this reads for sense: a well-formed dilemma that makes none passes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from negotiator.data import SHIPPED, read_records
from negotiator.data.likeness import TOO_CLOSE, Neighbours, alike, copied, is_running_english, normalized
from negotiator.generate.items import LENGTHS, PASSAGES, Draft, Kind

UNREADABLE = "unreadable"
MARKUP = "control tokens or markup"
LENGTH = "length"
NO_QUESTION = "does not end with a question"
GARBAGE = "not running English"
NOT_SECOND_PERSON = "persona not in the second person"
BOTH_ALIKE = "both parties alike"
DUPLICATE = "duplicate"
LIKE_EXAMPLE = "too close to an example"
LIKE_ITEM = "too close to another item"
REASONS = (
    *(UNREADABLE, MARKUP, LENGTH, NO_QUESTION, GARBAGE),
    *(NOT_SECOND_PERSON, BOTH_ALIKE, DUPLICATE, LIKE_EXAMPLE, LIKE_ITEM),
)

MOST_COPIED = 0.2  # share of a passage's 3-grams that may be an example's
MOST_ALIKE = 0.35  # word Jaccard of two parties; between shipped ones it is below 0.15

# What chat templates, prompts and Markdown leave behind; no shipped text has any of these characters.
_MARKUP = re.compile(
    r"[<>{}\[\]|`*#\ufffd]|\$[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]|\b(?:system|user|assistant)\s*:", re.IGNORECASE
)
_QUOTED = re.compile(r'"[^"]*"|“[^”]*”')
_YOU = re.compile(r"\byou(?:r|rs|rself)?\b", re.IGNORECASE)
_I = re.compile(r"\bI\b|\b(?:[Mm]y|[Mm]e|[Mm]ine|[Mm]yself)\b")


class Known:
    """All texts that a new item must not repeat."""

    def __init__(self) -> None:
        self._exact: set[str] = set()
        self._neighbours = Neighbours()

    def add(self, fields: Iterable[tuple[str, str]]) -> None:
        """Of one item, (name, text) each, named as in a draft."""
        for name, text in fields:
            if name == "tension":
                self._exact.add(_tension(text))
            elif name in PASSAGES:
                self._exact.add(normalized(text))
                self._neighbours.add(text)

    def duplicates(self, draft: Draft) -> bool:
        tension = "tension" in draft and _tension(draft["tension"]) in self._exact
        return tension or any(normalized(text) in self._exact for text in passages(draft))

    def likeness(self, text: str) -> float:
        """To the closest of them."""
        return max((similarity for similarity, _ in self._neighbours.of(text)), default=0.0)


def shipped_texts() -> Known:
    """Of all shipped files: an evaluation item must not repeat a dilemma either, nor the other way round."""
    known = Known()
    for path in SHIPPED.values():
        for record in read_records(path):
            known.add(fields_of(record.fields))
    return known


def fields_of(line: dict[str, Any]) -> list[tuple[str, str]]:
    """The texts of a line that was read before, named as in a draft."""
    texts = [(name, line[name]) for name in ("tension", "text") if name in line]
    return texts + [(f"persona_{side}", line[side]["persona"]) for side in ("a", "b") if side in line]


def passages(draft: Draft) -> list[str]:
    return [draft[name] for name in PASSAGES if name in draft]


def refusal(kind: Kind, draft: Draft | None, shown: Sequence[Draft], known: Known) -> str | None:
    """The first reason that applies, None if the draft may be kept. `shown`: the examples that its writer saw."""
    if draft is None or ("tension" in draft and len(_sides(draft["tension"])) != 2):
        return UNREADABLE
    if any(_MARKUP.search(text) for text in draft.values()):
        return MARKUP
    if any(not low <= len(draft[name].split()) <= high for name, (low, high) in LENGTHS[kind].items()):
        return LENGTH
    if kind in ("dilemmas", "eval_conflict") and not draft["text"].rstrip("\"'\u201d\u2019 ").endswith("?"):
        return NO_QUESTION
    if not all(is_running_english(text) for text in passages(draft)):
        return GARBAGE
    if "persona_a" in draft:
        if not all(_in_second_person(draft[f"persona_{side}"]) for side in "ab"):
            return NOT_SECOND_PERSON
        same_name = normalized(draft["name_a"]) == normalized(draft["name_b"])
        if same_name or alike(draft["persona_a"], draft["persona_b"]) > MOST_ALIKE:
            return BOTH_ALIKE
    if known.duplicates(draft):
        return DUPLICATE
    if any(copied(text, example) > MOST_COPIED for text in passages(draft) for e in shown for example in passages(e)):
        return LIKE_EXAMPLE
    if any(known.likeness(text) >= TOO_CLOSE for text in passages(draft)):
        return LIKE_ITEM
    return None


def _in_second_person(text: str) -> bool:
    own = _QUOTED.sub(" ", text)
    return len(_YOU.findall(own)) > len(_I.findall(own))


def _tension(text: str) -> str:
    """The same whichever side is named first."""
    return " vs ".join(sorted(_sides(text)))


def _sides(tension: str) -> list[str]:
    return [normalized(side) for side in re.split(r"\b(?:vs\.?|versus)\s", tension)]
