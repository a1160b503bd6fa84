"""Group-relative advantages against NumPy, and the cases where a group must carry no signal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negotiator.advantages import assign
from negotiator.types import (
    AgreementVerdict,
    Dialogue,
    DialogueGroup,
    Dilemma,
    Generation,
    Persona,
    Scenario,
    ScoreVerdict,
    Utterance,
)

SCENARIO = Scenario(0, Dilemma("d", "everyday", "home", "What now?"), Persona("a", "A"), Persona("b", "B"), "pair")


def group(*rewards: float | None, turns: int = 2) -> DialogueGroup:
    """One dialogue a reward; None failed. Later dialogues take more turns."""
    dialogues = []
    for i, reward in enumerate(rewards):
        utterance = Utterance("agent1", "", (1,), 1, Generation((2,), (-0.5,), "stop", 0, 0))
        dialogue = Dialogue(SCENARIO, i, [utterance] * turns * (i + 1), [AgreementVerdict(True, 1.0)], state="scored")
        if reward is None:
            dialogue.state, dialogue.failure, dialogue.advantage = "failed", "judge timed out", 5.0
        else:
            dialogue.score = ScoreVerdict(reward)
        dialogues.append(dialogue)
    return DialogueGroup(SCENARIO, dialogues)


def advantages(g: DialogueGroup) -> list[float]:
    return [d.advantage for d in g.dialogues]


def test_advantages_are_group_relative_and_per_dialogue() -> None:
    first, second = group(0.0, 1.0, 5.0), group(4.0, 3.0)
    stats = assign([first, second])
    for g in (first, second):
        rewards = np.array([d.reward for d in g.dialogues])
        assert advantages(g) == pytest.approx(list((rewards - rewards.mean()) / (rewards.std() + 1e-4)), rel=1e-12)
    everything = np.array([0, 1, 5, 4, 3])
    assert (stats.reward_mean, stats.reward_std) == pytest.approx((everything.mean(), everything.std()))
    assert (stats.reward_min, stats.reward_max) == (0, 5)
    assert (stats.valid_dialogues, stats.failed_dialogues, stats.zero_variance_groups) == (5, 0, 0)


def test_no_agreement_is_a_reward_of_zero_and_a_failure_is_none() -> None:
    g = group(3.0, None, 1.0, 2.0)
    g.dialogues[2].state, g.dialogues[2].score = "no_agreement", None
    stats = assign([g], eps=0.0)
    rewards = np.array([3.0, 0.0, 2.0])
    expected = (rewards - rewards.mean()) / rewards.std()
    assert advantages(g) == pytest.approx([expected[0], 0.0, expected[1], expected[2]])
    assert advantages(g)[1] == 0  # also where an earlier value stood
    assert (stats.valid_dialogues, stats.failed_dialogues) == (3, 1)
    assert stats.reward_mean == pytest.approx(5 / 3)


@pytest.mark.parametrize(
    "rewards",
    [
        (0.0, 0.0, 0.0),
        (5.0, 5.0),
        (2.1, 2.1, 2.1, 2.1, 2.1, 2.1, 2.1),  # their mean is not exactly 2.1 in every order of summation
        (0.1 + 0.2, 0.3),
        (3.1415925, 3.1415927, 3.1415926),  # rounding in a judge's probabilities
        (-2.0, -2.0),
        (4.0,),
        (4.0, None),
        (None, None),
        (),
    ],
)
def test_equal_rewards_give_exactly_zero(rewards: tuple[float | None, ...]) -> None:
    g = group(*rewards)
    stats = assign([group(1.0, 2.0), g])
    assert all(a == 0.0 for a in advantages(g))
    assert stats.zero_variance_groups == 1


@pytest.mark.parametrize("rewards", [(1.0, -1.0), (0.0, 1e-3), (4.0, 4.01), (0.0, 0.0, 0.0, 5.0)])
def test_a_mean_or_a_gap_of_nearly_nothing_is_still_signal(rewards: tuple[float, ...]) -> None:
    g = group(*rewards)
    assert assign([g]).zero_variance_groups == 0
    assert max(advantages(g)) > 0 > min(advantages(g))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=9))
def test_advantages_are_centred_and_ordered_like_the_rewards(rewards: list[float]) -> None:
    g = group(*rewards)
    stats = assign([g])
    values = advantages(g)
    assert abs(math.fsum(values)) < 1e-6
    if stats.zero_variance_groups:
        assert not any(values)
    else:
        assert [values[i] for i in np.argsort(rewards, kind="stable")] == sorted(values)
        assert np.mean(np.square(values)) <= 1 + 1e-9


def test_nothing_ended() -> None:
    stats = assign([group(None)])
    assert math.isnan(stats.reward_mean)
    assert math.isnan(stats.reward_std)
    assert stats.failed_dialogues == 1


def test_a_reward_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dialogue 1 of scenario 0 is nan"):
        assign([group(1.0, math.nan)])


def test_without_agreement_the_reward_is_0_though_an_evaluation_has_scored_it():
    scored, disagreed = (Dialogue(None, 0, score=ScoreVerdict(4.0), state=s) for s in ("scored", "no_agreement"))
    assert (scored.reward, disagreed.reward) == (4.0, 0.0)
