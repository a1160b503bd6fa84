"""Group-relative advantages: how much better a dialogue did than the others of its scenario."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from negotiator.types import DialogueGroup

# Rewards that differ by less than this share of the largest are equal: what is left is rounding in the judge.
EQUAL_REWARDS = 1e-5


@dataclass(frozen=True, slots=True)
class AdvantageStats:
    """Rewards of one step, over all dialogues that ended; NaN when none did."""

    reward_mean: float
    reward_std: float
    reward_min: float
    reward_max: float
    valid_dialogues: int
    failed_dialogues: int
    zero_variance_groups: int


def assign(groups: Sequence[DialogueGroup], eps: float = 1e-4) -> AdvantageStats:
    """Set every dialogue's advantage to (reward - mean) / (std + eps) over the valid dialogues of its group.

    Each dialogue counts once, however many turns it took. Failed dialogues take part in nothing and get 0. A group
    whose valid rewards are all equal, or that has fewer than two, gets exactly 0 and counts as zero-variance.

    The std is the population's: advantages then have mean square 1 whatever the number of valid dialogues, so losing
    some to failures does not change a group's weight (with the sample's it would be 1 - 1/n).

    Raises:
        ValueError: a reward is not finite.
    """
    rewards_of_all: list[float] = []
    zero_variance_groups = 0
    for group in groups:
        for dialogue in group.dialogues:
            dialogue.advantage = 0.0
        rewards = [dialogue.reward for dialogue in group.valid]
        for dialogue, reward in zip(group.valid, rewards, strict=True):
            if not math.isfinite(reward):
                raise ValueError(
                    f"the reward of dialogue {dialogue.index} of scenario {group.scenario.index} is {reward}; "
                    "a reward function must return a finite number or report a failure"
                )
        rewards_of_all += rewards
        if len(rewards) < 2 or max(rewards) - min(rewards) <= EQUAL_REWARDS * max(map(abs, rewards)):
            zero_variance_groups += 1
            continue
        mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
        for dialogue, reward in zip(group.valid, rewards, strict=True):
            dialogue.advantage = (reward - mean) / (std + eps)

    return AdvantageStats(
        reward_mean=statistics.fmean(rewards_of_all) if rewards_of_all else math.nan,
        reward_std=statistics.pstdev(rewards_of_all) if rewards_of_all else math.nan,
        reward_min=min(rewards_of_all, default=math.nan),
        reward_max=max(rewards_of_all, default=math.nan),
        valid_dialogues=len(rewards_of_all),
        failed_dialogues=sum(len(group.dialogues) for group in groups) - len(rewards_of_all),
        zero_variance_groups=zero_variance_groups,
    )
