"""Who says whether a dialogue ended in agreement, and what its outcome is worth."""

from __future__ import annotations

from negotiator.config import JudgeConfig
from negotiator.judges.base import AgreementJudge, RewardJudge
from negotiator.judges.local import LocalJudge
from negotiator.judges.openai import OpenAIJudge
from negotiator.judges.plugin import PluginJudge

__all__ = ["AgreementJudge", "LocalJudge", "RewardJudge", "make_judges"]


def make_judges(config: JudgeConfig, local: LocalJudge | None) -> tuple[AgreementJudge, RewardJudge]:
    """(agreement judge, reward judge) as configured; `local` is needed only if one of them is "local".

    Raises ValueError if an endpoint's key is missing or a plug-in function cannot be found.
    """
    # One endpoint serves both roles through one client, so that `concurrency` bounds them together.
    openai = OpenAIJudge(config) if "openai" in (config.agreement, config.reward) else None

    def make(kind: str) -> LocalJudge | OpenAIJudge | PluginJudge:
        if kind == "local":
            assert local is not None, "a local judge needs its engine"
            return local
        if kind == "openai":
            assert openai is not None
            return openai
        return PluginJudge(kind, config.agree_threshold)

    return make(config.agreement), make(config.reward)
