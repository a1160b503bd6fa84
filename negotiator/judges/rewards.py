"""Plug-in judges that need no model, for demonstrations, tests and as examples of how to write one.

--judge.reward negotiator.judges.rewards:asks_a_question --judge.agreement negotiator.judges.rewards:after_a_round
"""

from __future__ import annotations

from negotiator.types import Dialogue, Scenario


def asks_a_question(scenario: Scenario, dialogue: Dialogue) -> float:
    """5 times the share of utterances that ask something: even a small model learns that quickly."""
    asked = sum("?" in utterance.text for utterance in dialogue.utterances)
    return 5.0 * asked / len(dialogue.utterances)


def after_a_round(scenario: Scenario, dialogue: Dialogue) -> bool:
    """Agreement at once, so that every dialogue is one round long and is scored."""
    return True
