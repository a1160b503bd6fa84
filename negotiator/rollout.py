"""All dialogues of a step at once, each waiting only for its own engine calls and judges."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from negotiator.dialogue import AGENTS, Table, answer, negotiate
from negotiator.endpoint import BudgetSpent
from negotiator.types import Dialogue, DialogueGroup, Scenario


async def run(
    table: Table, step: int, scenarios: Sequence[Scenario], group_size: int, always_complete: bool = False
) -> list[DialogueGroup]:
    """`group_size` dialogues per scenario. An exception in one of them cancels all and is raised.

    BudgetSpent is raised when all have ended.

    `always_complete`: see `dialogue.negotiate`.
    """
    for scenario in scenarios:
        for prefix in _prefixes(table, scenario):
            await table.engine.warm(prefix)

    def play(scenario: Scenario, index: int) -> Coroutine[Any, Any, Dialogue]:
        if table.mode == "single":
            return answer(table, step, scenario, index)
        return negotiate(table, step, scenario, index, always_complete)

    groups = [[asyncio.create_task(play(scenario, index)) for index in range(group_size)] for scenario in scenarios]
    tasks = [task for group in groups for task in group]
    try:
        await asyncio.gather(*tasks)
    except BudgetSpent:
        await asyncio.wait(tasks)  # what is under way is paid for: its verdicts are kept for the next try
        raise
    finally:
        for task in tasks:
            task.cancel()  # the others, after one has failed
    return [
        DialogueGroup(scenario, [task.result() for task in group])
        for scenario, group in zip(scenarios, groups, strict=True)
    ]


def _prefixes(table: Table, scenario: Scenario) -> list[tuple[int, ...]]:
    """What many prompts of the scenario begin with."""
    if table.mode == "single":
        return [table.templates.answer_prompt(scenario.dilemma.text)]
    agents = [table.templates.prefix_ids(scenario, agent) for agent in AGENTS]
    return [*agents, table.templates.completion_prefix(scenario)]
