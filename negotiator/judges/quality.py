"""How good a judge is, on transcripts of runs: against itself, and against a second judge.

Judged again are all rounds of a sample of dialogues (do they agree by then?) and all their completions (which score?).
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from negotiator.data import load_dilemmas, load_eval_conflict, load_eval_open, load_personas
from negotiator.judges.base import AgreementJudge, RewardJudge
from negotiator.judges.figures import Bin, calibration_error, cohen_kappa, kendall_tau_b, reliability, spearman
from negotiator.seeds import derive_seed
from negotiator.types import AgreementVerdict, Dialogue, Dilemma, Generation, Persona, Scenario, ScoreVerdict, Utterance

SAME_SCORE = 1e-3  # a local judge's figures differ by their rounding

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Items:
    """What is judged: dialogues as they stood after a round, and dialogues with a completion."""

    rounds: list[Dialogue]
    completions: list[Dialogue]


@dataclass(frozen=True, slots=True)
class Verdicts:
    rounds: list[AgreementVerdict]
    completions: list[ScoreVerdict]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two verdicts on each item. Figures are None where nothing is left, or where they are undefined."""

    items: int  # that have both
    failed: int
    same: float | None  # share
    difference: float | None  # mean, of P(agree) or of scores
    kappa: float | None  # of yes and no; scores have none
    spearman: float | None
    kendall: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The judge's figures beside the second judge's: its yes and no, or its scores."""

    bins: list[Bin]
    error: float | None


def load_transcripts(files: Sequence[Path], dilemmas: Path | None, personas: Path | None) -> list[Dialogue]:
    """The dialogues of a run's transcripts; dilemmas and personas are those of the data files and the shipped ones."""
    loaded = [*load_dilemmas(dilemmas), *load_eval_open(), *(s.dilemma for s in load_eval_conflict())]
    if dilemmas is not None:
        loaded = [*load_dilemmas(), *loaded]
    dilemma_of = {dilemma.id: dilemma for dilemma in loaded}
    persona_of = {(s.pair_id, p.name): p for s in load_eval_conflict() for p in (s.agent1, s.agent2)}
    for path in {None, personas}:
        persona_of |= {(pair.id, p.name): p for pair in load_personas(path) for p in (pair.a, pair.b)}
    found = []
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file; transcripts are runs/<name>/transcripts/step-*.jsonl")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(_dialogue(json.loads(line), dilemma_of, persona_of))
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(f"{file}:{number}: {_complaint(error)}") from None
    return found


def sample(dialogues: Sequence[Dialogue], count: int, seed: int) -> Items:
    """`count` of the dialogues, drawn evenly; all if there are no more."""
    drawn = sorted(range(len(dialogues)), key=lambda number: derive_seed(seed, "quality", number))[:count]
    chosen = [dialogues[number] for number in sorted(drawn)]
    rounds = [
        Dialogue(d.scenario, d.index, d.utterances[:said])
        for d in chosen
        for said in range(2, len(d.utterances) + 1, 2)
    ]
    return Items(rounds, [d for d in chosen if d.completion])


async def judge_all(
    items: Items, judges: tuple[AgreementJudge, RewardJudge], on_verdict: Callable[[], None]
) -> Verdicts:
    """All at once: judges bound by themselves what they do together."""

    async def counted(call: Coroutine[Any, Any, T]) -> T:
        verdict = await call
        on_verdict()
        return verdict

    agreement, reward = judges
    return Verdicts(
        await asyncio.gather(*(counted(agreement.agreement(d.scenario, d)) for d in items.rounds)),
        await asyncio.gather(*(counted(reward.score(d.scenario, d)) for d in items.completions)),
    )


def compare_agreement(pairs: Sequence[tuple[AgreementVerdict, AgreementVerdict]]) -> Comparison:
    valid = [(a, b) for a, b in pairs if a.failure is None and b.failure is None]
    first, second = [a.agree for a, _ in valid], [b.agree for _, b in valid]
    numbers = [(a.probability, b.probability) for a, b in valid]
    same = [a == b for a, b in zip(first, second, strict=True)]
    return _comparison(len(pairs), numbers, same, cohen_kappa(first, second))


def compare_scores(pairs: Sequence[tuple[ScoreVerdict, ScoreVerdict]]) -> Comparison:
    numbers = [(a.score, b.score) for a, b in pairs if a.failure is None and b.failure is None]
    return _comparison(len(pairs), numbers, [abs(a - b) <= SAME_SCORE for a, b in numbers], None)


def calibrate_agreement(pairs: Sequence[tuple[AgreementVerdict, AgreementVerdict]]) -> Calibration:
    valid = [(a.probability, float(b.agree)) for a, b in pairs if a.failure is None and b.failure is None]
    bins = reliability([p for p, _ in valid], [agreed for _, agreed in valid], highest=1, bins=10)
    return Calibration(bins, calibration_error(bins))


def calibrate_scores(pairs: Sequence[tuple[ScoreVerdict, ScoreVerdict]]) -> Calibration:
    valid = [(a.score, b.score) for a, b in pairs if a.failure is None and b.failure is None]
    bins = reliability([a for a, _ in valid], [b for _, b in valid], highest=5, bins=5)
    return Calibration(bins, calibration_error(bins))


def repeated(verdicts: Sequence[Sequence[T]]) -> list[tuple[T, T]]:
    """Each item's verdicts of each two repetitions."""
    return [pair for a, b in itertools.combinations(verdicts, 2) for pair in zip(a, b, strict=True)]


def _comparison(
    total: int, numbers: Sequence[tuple[float, float]], same: Sequence[bool], kappa: float | None
) -> Comparison:
    n = len(numbers)
    first, second = [a for a, _ in numbers], [b for _, b in numbers]
    return Comparison(
        items=n,
        failed=total - n,
        same=sum(same) / n if n else None,
        difference=sum(abs(a - b) for a, b in numbers) / n if n else None,
        kappa=kappa,
        spearman=spearman(first, second),
        kendall=kendall_tau_b(first, second),
    )


def _dialogue(
    line: Mapping[str, Any], dilemma_of: Mapping[str, Dilemma], persona_of: Mapping[tuple[str, str], Persona]
) -> Dialogue:
    dilemma = dilemma_of.get(line["dilemma"])
    if dilemma is None:
        raise ValueError(f'no dilemma has the id "{line["dilemma"]}"; name the run\'s with --data.dilemmas')
    pair = line["pair"]
    one, two = (persona_of.get((pair, line[agent])) for agent in ("agent1", "agent2"))
    if one is None or two is None:
        raise ValueError(f'no persona pair "{pair}" of these names; name the run\'s file with --data.personas')
    utterances = [
        Utterance(said["agent"], said["text"], (), 0, Generation((), (), said["finish_reason"], 0, 0))
        for said in line["utterances"]
    ]
    scenario = Scenario(0, dilemma, one, two, pair)
    return Dialogue(scenario, line["dialogue"], utterances, completion=line["completion"])


def _complaint(error: Exception) -> str:
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
        return str(error)
    return "not a line of a run's transcript"
