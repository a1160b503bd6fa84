"""A judge that is any Python function, named as "module:function", plain or async.

A reward function gets (scenario, dialogue) and returns a number from 0 to 5. An agreement function gets the same and
returns a bool, or P(agree) from 0 to 1. One for evaluation gets (question, first answer, second answer, criterion) and
returns "first", "second" or "tie". What such a function raises is its author's to see: it ends the run.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from negotiator.judges.base import Criterion, PairVerdict
from negotiator.types import AgreementVerdict, Dialogue, Scenario, ScoreVerdict


class PluginJudge:
    """Every kind of judge; which one the function serves as depends on the method that is called.

    `threshold` is the P(agree) from which a round counts as agreed. Raises ValueError if the function cannot be found.
    """

    def __init__(self, name: str, threshold: float) -> None:
        self._name = name
        self._threshold = threshold
        self._function = _find(name)

    async def agreement(self, scenario: Scenario, dialogue: Dialogue) -> AgreementVerdict:
        answer = await self._call(scenario, dialogue)
        if isinstance(answer, bool):
            return AgreementVerdict(answer, float(answer))
        probability = self._number(answer, 1, "must return True, False or a probability from 0 to 1")
        return AgreementVerdict(probability >= self._threshold, probability)

    async def score(self, scenario: Scenario, dialogue: Dialogue) -> ScoreVerdict:
        answer = await self._call(scenario, dialogue)
        return ScoreVerdict(self._number(answer, 5, "must return a number from 0 to 5"))

    async def compare(self, question: str, first: str, second: str, criterion: Criterion) -> PairVerdict:
        answer = await self._call(question, first, second, criterion)
        if answer not in ("first", "second", "tie"):
            raise ValueError(f'judge function {self._name} must return "first", "second" or "tie", not {answer!r}')
        return PairVerdict(answer)

    async def close(self) -> None:
        """The function is its author's; there is nothing to free."""

    async def _call(self, *arguments: Any) -> Any:
        try:
            answer = self._function(*arguments)
            return await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            raise RuntimeError(f"judge function {self._name} raised {type(error).__name__}: {error}") from error

    def _number(self, answer: Any, highest: float, rule: str) -> float:
        try:
            number = float(answer)  # also takes numpy and torch scalars
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(answer, str) or not 0 <= number <= highest:
            raise ValueError(f"judge function {self._name} {rule}, not {answer!r}")
        return number


def _find(name: str) -> Callable[..., Any]:
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", name):
        raise ValueError(f'a judge function is named "module:function", not "{name}"')
    module_name, function_name = name.split(":")
    if str(Path.cwd()) not in sys.path:  # `python -m` puts it there, the installed command does not
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f'judge function "{name}": cannot import {module_name} from here ({error})') from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f'judge function "{name}": {module_name} has no function named "{function_name}"')
    return function  # type: ignore[no-any-return]
