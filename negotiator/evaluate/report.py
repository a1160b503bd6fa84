"""The figures of an evaluation as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from negotiator.evaluate.policies import SIDES, Policy
from negotiator.evaluate.records import MODES
from negotiator.evaluate.statistics import LEVEL, RESAMPLES, Estimate
from negotiator.evaluate.summary import Summary, WinRate

CRITERIA = {"resolution": "resolves the conflict", "collective_agency": "Collective Agency"}


def markdown(summary: Summary, policies: Sequence[Policy], judges: str, command: str) -> str:
    a, b = policies
    parts = [
        f"# A: {a.label}, against B: {b.label}",
        f"`{command}`",
        f"Each policy negotiates {summary.items['conflict']} conflicts with itself and answers "
        f"{summary.items['open']} open questions. {judges}",
        f"In brackets: intervals of {100 * LEVEL:.0f} %, from {RESAMPLES:,} bootstrap resamples of the items.",
        "## Who wins",
        "A pair counts if the judge names the same winner in both orders; the win rate is A's share of those. "
        "Identical texts are tied. Wilson's interval is the one to read where few pairs count.",
        table(
            "mode | items | criterion | A wins | Wilson | counted, A : B | tied (identical) | inconsistent | failed",
            [_win_row(rate) for rate in summary.win_rates],
        ),
        "## Figures",
        "A - B is over the items that both have.",
        table(
            "mode | figure | A | B | A - B",
            [
                [m.mode, m.name, *(f"{_shown(e)}, n = {e.count}" for e in (m.a, m.b, m.difference))]
                for m in summary.measures
            ],
        ),
    ]
    failed = [f"{side} {mode} {summary.failed[side][mode]}" for side in SIDES for mode in MODES]
    if any(summary.failed[side][mode] for side in SIDES for mode in MODES):
        parts.append(
            f"Items on which a judge failed, which count nowhere: {', '.join(failed)}. A rerun tries them again."
        )
    if summary.abilities:
        parts += ["## General abilities", "By lm-evaluation-harness, with its standard errors.", _abilities(summary)]
    return "\n\n".join(parts) + "\n"


def table(header: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {header} |", "|" + " --- |" * (header.count("|") + 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _win_row(rate: WinRate) -> list[str]:
    inconsistent = f"{rate.inconsistent} ({100 * rate.inconsistent / rate.pairs:.0f} %)" if rate.pairs else "0"
    return [
        rate.mode,
        rate.set,
        CRITERIA[rate.criterion],
        _shown(rate.win_rate, 1, 100, " %"),
        "-" if rate.wilson is None else f"[{100 * rate.wilson[0]:.1f}, {100 * rate.wilson[1]:.1f}]",
        f"{rate.win_rate.count} of {rate.pairs}, {rate.a_wins} : {rate.b_wins}",
        f"{rate.tied} ({rate.identical})",
        inconsistent,
        str(rate.failed),
    ]


def _shown(estimate: Estimate, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    if estimate.mean is None or estimate.low is None or estimate.high is None:
        return "-"
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean}{unit} [{low}, {high}]"


def _abilities(summary: Summary) -> str:
    found = {(ability.task, ability.policy): ability for ability in summary.abilities}
    rows = []
    for task in dict.fromkeys(ability.task for ability in summary.abilities):
        of = {side: found[task, side].metrics if (task, side) in found else {} for side in SIDES}
        for metric in dict.fromkeys(name for side in SIDES for name in of[side] if "_stderr" not in name):
            rows.append([task, metric, *(_with_error(of[side], metric) for side in SIDES)])
    return table("task | metric | A | B", rows)


def _with_error(metrics: dict[str, float], metric: str) -> str:
    if metric not in metrics:
        return "-"
    errors = [value for name, value in metrics.items() if "_stderr" in name and name.replace("_stderr", "") == metric]
    return f"{metrics[metric]:.3f}" + (f" ± {errors[0]:.3f}" if errors else "")
