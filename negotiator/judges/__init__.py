"""Who says whether a dialogue ended in agreement, what its outcome is worth, and which of two answers is better."""

from __future__ import annotations

from pathlib import Path

from negotiator.config import JudgeConfig
from negotiator.judges.base import AgreementJudge, PairJudge, PairVerdict, RewardJudge
from negotiator.judges.local import LocalJudge
from negotiator.judges.openai import OpenAIJudge
from negotiator.judges.plugin import PluginJudge

__all__ = [
    "AgreementJudge",
    "LocalJudge",
    "PairJudge",
    "PairVerdict",
    "RewardJudge",
    "make_judges",
    "make_pair_judge",
]

AnyJudge = LocalJudge | OpenAIJudge | PluginJudge


def make_judges(
    config: JudgeConfig, local: LocalJudge | None, store: Path | None = None, repetition: int = 0
) -> tuple[AgreementJudge, RewardJudge]:
    """(agreement judge, reward judge) as configured; `local` is needed only if one of them is "local".

    `store`: where an endpoint's answers are kept unless `config.cache` says so. `repetition`: see `OpenAIJudge`.
    Raises ValueError if an endpoint's key is missing or a plug-in function cannot be found.
    """
    # One endpoint serves both roles through one client, so that `concurrency` and budgets bound them together.
    openai = OpenAIJudge(config, store, repetition) if "openai" in (config.agreement, config.reward) else None
    return _make(config.agreement, config, local, openai), _make(config.reward, config, local, openai)


def make_pair_judge(config: JudgeConfig, local: LocalJudge | None, store: Path | None) -> PairJudge:
    """The judge that `config.evaluation` names; arguments and errors are those of `make_judges`."""
    openai = OpenAIJudge(config, store) if config.evaluation == "openai" else None
    return _make(config.evaluation, config, local, openai)


def _make(kind: str, config: JudgeConfig, local: LocalJudge | None, openai: OpenAIJudge | None) -> AnyJudge:
    if kind == "local":
        assert local is not None, "a local judge needs its engine"
        return local
    if kind == "openai":
        assert openai is not None
        return openai
    return PluginJudge(kind, config.agree_threshold)
