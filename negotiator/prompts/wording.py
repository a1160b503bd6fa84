"""The wording of every prompt, one text file each, with `$name` where something is filled in."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from string import Template

from negotiator.types import Scenario

_HERE = Path(__file__).parent


@cache
def _read(prompt: str) -> str:
    return (_HERE / f"{prompt}.txt").read_text(encoding="utf-8").strip()


def fill(prompt: str, /, **values: str) -> str:
    """The text of `prompt` with its `$` places filled: each of them, and nothing that is not one.

    Values are filled in as they are; a `$` in them means nothing.
    """
    template = Template(_read(prompt))
    assert set(template.get_identifiers()) == set(values), f"{prompt}.txt has places {template.get_identifiers()}"
    return template.substitute(values)


def version(*prompts: str) -> str:
    """Changes with any word of them."""
    return hashlib.sha256("\n\n".join(map(_read, prompts)).encode()).hexdigest()[:8]


def examples(prompt: str) -> list[tuple[str, str]]:
    """(question, answer) for each paragraph of `prompt`; the answer is the paragraph's last line."""
    return [(question, answer) for question, _, answer in (p.rpartition("\n") for p in _read(prompt).split("\n\n"))]


def spoken(scenario: Scenario, texts: Sequence[str]) -> str:
    """The whole dialogue under the personas' names, a line for each utterance, agent 1's first."""
    names = (scenario.agent1.name, scenario.agent2.name)
    return "\n".join(f"{names[turn % 2]}: {one_line(text)}" for turn, text in enumerate(texts))


def one_line(text: str) -> str:
    """So that no utterance can pretend, on a line of its own, to be somebody else's."""
    return " ".join(text.split())
