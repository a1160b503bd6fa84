"""All texts of both policies side by side: JSONL for programs, one HTML page for people.

The texts come from models and judges and may contain anything: on the page everything is escaped, and its policy lets
it load and run nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from negotiator.evaluate.compare import QUESTIONS
from negotiator.evaluate.play import Items
from negotiator.evaluate.policies import SIDES, Side
from negotiator.evaluate.records import MODES, Comparison, ItemSet, PairKey, Text, TextKey
from negotiator.types import Scenario

HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Transcripts</title>
<style>
body { font: 15px/1.45 sans-serif; max-width: 1200px; margin: 1em auto; padding: 0 1em }
section { border-top: 1px solid #999; margin-top: 2em }
.sides { display: grid; grid-template-columns: 1fr 1fr; gap: 1.5em }
.sides p { white-space: pre-wrap; overflow-wrap: anywhere; margin: .4em 0 }
.final { background: #eef4ee; padding: .4em }
.note { color: #555; font-size: 90% }
</style></head><body>
"""


def rows(
    items: Items, texts: Mapping[TextKey, Text], comparisons: Mapping[PairKey, Comparison]
) -> Iterator[dict[str, Any]]:
    """One for each item and mode: the question, who was asked, what each made of it, and who was said to be better."""
    sets: tuple[ItemSet, ItemSet] = ("conflict", "open")
    for item_set in sets:
        for scenario in items.of(item_set):
            for mode in MODES:
                item = scenario.dilemma.id
                found = {c: comparisons.get((mode, item_set, item, c)) for s, c in QUESTIONS if s == item_set}
                yield {
                    "item": item,
                    "set": item_set,
                    "mode": mode,
                    "question": scenario.dilemma.text,
                    "personas": _personas(scenario),
                    "winners": {criterion: each.outcome if each else None for criterion, each in found.items()},
                } | {side: _side(texts.get((side, mode, item_set, item))) for side in SIDES}


def as_jsonl(found: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in found)


def as_html(found: list[dict[str, Any]], labels: Mapping[Side, str]) -> str:
    return HEAD + "\n".join(_section(row, labels) for row in found) + "\n</body></html>\n"


def _personas(scenario: Scenario) -> list[dict[str, str]]:
    return [{"name": p.name, "persona": p.text} for p in (scenario.agent1, scenario.agent2) if p.name]


def _side(text: Text | None) -> dict[str, Any] | None:
    if text is None:
        return None
    return {
        "agreed": text.agreed,
        "rounds": text.rounds,
        "utterances": text.utterances,
        "completion": text.completion,
        "score": text.score,
        "failure": text.failure,
    }


def _section(row: dict[str, Any], labels: Mapping[Side, str]) -> str:
    winners = ", ".join(f"{criterion}: {winner or 'not compared'}" for criterion, winner in row["winners"].items())
    personas = "".join(
        f"<p class=note>{'12'[i]}. {escape(p['name'])}: {escape(p['persona'])}</p>"
        for i, p in enumerate(row["personas"])
    )
    sides = "".join(f"<div><h3>{side}: {escape(labels[side])}</h3>{_text(row, side)}</div>" for side in SIDES)
    return (
        f"<section><h2>{escape(row['item'])}, {row['mode']}</h2><p>{escape(row['question'])}</p>{personas}"
        f"<p class=note>{escape(winners)}</p><div class=sides>{sides}</div></section>"
    )


def _text(row: dict[str, Any], side: Side) -> str:
    text = row[side]
    if text is None:
        return "<p class=note>not written yet</p>"
    names = [persona["name"] for persona in row["personas"]]
    said = "".join(f"<p><b>{escape(names[i % 2])}</b>: {escape(u)}</p>" for i, u in enumerate(text["utterances"]))
    final = "" if text["completion"] is None else f"<p class=final>{escape(text['completion'])}</p>"
    notes = [f"score {text['score']:.2f}"] if text["score"] is not None else []
    if row["set"] == "conflict":
        notes.append(f"{'agreed' if text['agreed'] else 'no agreement'} after {text['rounds']} rounds")
    notes += [f"failed: {text['failure']}"] if text["failure"] else []
    return f"{said}{final}<p class=note>{escape('; '.join(notes))}</p>"
