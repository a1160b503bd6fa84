"""A dialogue for human readers."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from negotiator.types import Dialogue, DialogueGroup


def best_dialogue(groups: Sequence[DialogueGroup]) -> Dialogue | None:
    """The first dialogue of the highest reward, or None when all failed."""
    ended = [dialogue for group in groups for dialogue in group.valid]
    return max(ended, key=lambda dialogue: dialogue.reward, default=None)


def render(dialogue: Dialogue, width: int = 100) -> str:
    """The dilemma, what was said and how it was judged, wrapped to `width` columns."""
    scenario = dialogue.scenario
    parts = [f"example dialogue on {scenario.dilemma.id}", scenario.dilemma.text]
    parts += [f"{scenario.persona(utterance.agent).name}: {utterance.text}" for utterance in dialogue.utterances]
    if dialogue.completion is not None:
        parts.append(f"Final solution: {dialogue.completion}")
    agreement = ", ".join(f"{verdict.probability:.2f}" for verdict in dialogue.verdicts)
    outcome = f"score {dialogue.reward:.2f} of 5" if dialogue.state == "scored" else dialogue.state.replace("_", " ")
    parts.append(f"[P(agree) after each round: {agreement}; {outcome}; advantage {dialogue.advantage:+.2f}]")
    return "\n\n".join(textwrap.fill(part, width) for part in parts)
