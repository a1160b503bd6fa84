"""What an endpoint's answer says: exactly one score, yes or no, or winner; anything else is refused, never guessed.

Asked for is {"code": "...", "score": 3}. Read as well is what models make of that: code fences, text around the object,
trailing commas, single quotes, other capitals, "3/5", lines like "Score: 3", thoughts before the answer. Refused is
whatever could mean something else, or nothing: two different values, what is cut off, and all without the code
(see `quoting`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from negotiator.endpoint import Unanswered

LONGEST = 8_000  # characters; what goes on longer has gone wrong, and would take long to search
_QUOTES = " \t\r\n\"'“”"

T = TypeVar("T")


def parse_agreement(answer: str, code: str) -> bool:
    return _read(answer, code, "agree", _yes_or_no, "neither yes nor no")


def parse_score(answer: str, code: str) -> float:
    return _read(answer, code, "score", _score, "no score from 0 to 5")


def parse_winner(answer: str, code: str) -> Literal["first", "second", "tie"]:
    return _read(answer, code, "winner", _winner, "neither A nor B nor tie")


def _read(answer: str, code: str, key: str, convert: Callable[[Any], T | None], complaint: str) -> T:
    """Raises Unanswered unless the answer holds `code`, and values for `key` that all mean the same."""
    text = _without_thoughts(answer)
    shown = repr(text.strip()[:80])
    if len(text) > LONGEST:
        raise Unanswered(f"the answer has {len(text)} characters: {shown}")
    if not re.search(rf"(?<![0-9a-z]){code}(?![0-9a-z])", text, re.IGNORECASE):
        raise Unanswered(f"the answer lacks the code of its instructions: {shown}")
    objects, around = _values(text, code, key)
    values = [convert(value) for value in objects]
    # Beside an object whatever cannot be meant as an answer is talk.
    values += [value for value in map(convert, around) if value is not None or not objects]
    first = values[0] if values else None
    if first is None or None in values:
        raise Unanswered(f"the answer is {complaint}: {shown}")
    if any(value != first for value in values):
        raise Unanswered(f"the answer says several things: {shown}")
    return first


def _without_thoughts(answer: str) -> str:
    """What comes after the last thought; nothing if that never ends."""
    parts = re.split(r"<(/?)(?:think|thinking|thought|reasoning)>", answer, flags=re.IGNORECASE)
    return "" if len(parts) > 1 and parts[-2] == "" else parts[-1]


def _values(text: str, code: str, key: str) -> tuple[list[Any], list[str]]:
    """What the text's objects give to `key`, and what it gives to it around them.

    Where it neither holds an object nor names the key: what it says besides the code.
    """
    objects, around = _objects(text)
    around = re.sub(r"[*`]", "", around)
    if around.count("{") != around.count("}"):  # an object that was cut off, perhaps within its value
        return [], []
    label = rf"""(?<![\w\\])["'“]?{key}["'”]?\s*[:=]\s*"""
    labelled = re.findall(rf"""{label}("[^"\n]*"|'[^'\n]*'|[^\n,;{{}}]*)""", around, re.IGNORECASE)
    if objects or labelled:
        return [value for values in objects for value in values.get(key, [])], labelled
    said = [part.strip(" \t\r\n\"':,;") for part in re.split(code, around, flags=re.IGNORECASE)]
    return [], [part for part in said if part.lower() not in ("", "code")]


def _objects(text: str) -> tuple[list[dict[str, list[Any]]], str]:
    """(the valid JSON objects in the text, as the values of each key in small letters, what is around them)."""
    decoder = json.JSONDecoder(object_pairs_hook=_pairs)
    objects: list[dict[str, list[Any]]] = []
    around: list[str] = []
    start = place = 0
    while (place := text.find("{", place)) >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            place += 1
            continue
        objects.append(value)
        around.append(text[start:place])
        start = place = end
    return objects, "\n".join([*around, text[start:]])


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, list[Any]]:
    values: dict[str, list[Any]] = {}
    for key, value in pairs:
        values.setdefault(key.strip().lower(), []).append(value)
    return values


def _score(value: Any) -> float | None:
    if isinstance(value, str):
        number = re.fullmatch(r"([0-9](?:\.[0-9]{1,6})?)(?:\s*(?:/|of|out of)\s*5(?:\.0)?)?", _bare(value))
        value = float(number[1]) if number else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 5:
        return None
    return float(value)


def _yes_or_no(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"yes": True, "true": True, "no": False, "false": False}.get(_bare(value))
    return value if isinstance(value, bool) else None


def _winner(value: Any) -> Literal["first", "second", "tie"] | None:
    if not isinstance(value, str):
        return None
    winners: dict[str, Literal["first", "second", "tie"]] = {"a": "first", "b": "second", "tie": "tie"}
    return winners.get(_bare(value).removeprefix("answer "))


def _bare(value: str) -> str:
    return value.strip(_QUOTES).rstrip(".!").strip(_QUOTES).lower()
