"""All dialogues of a step at once, each waiting only for its own engine calls and judges."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from negotiator.dialogue import AGENTS, Table, negotiate
from negotiator.types import DialogueGroup, Scenario


async def run(table: Table, step: int, scenarios: Sequence[Scenario], group_size: int) -> list[DialogueGroup]:
    """Negotiates `group_size` dialogues per scenario. An exception in one of them cancels all and is raised."""
    for scenario in scenarios:
        for agent in AGENTS:
            await table.engine.warm(table.templates.prefix_ids(scenario, agent))
        await table.engine.warm(table.templates.completion_prefix(scenario))
    groups = [
        [asyncio.create_task(negotiate(table, step, scenario, index)) for index in range(group_size)]
        for scenario in scenarios
    ]
    tasks = [task for group in groups for task in group]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()  # the others, after one has failed
    return [
        DialogueGroup(scenario, [task.result() for task in group])
        for scenario, group in zip(scenarios, groups, strict=True)
    ]
