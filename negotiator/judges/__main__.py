"""Says how good a judge is, on transcripts of runs.

    python -m negotiator.judges quality runs/x/transcripts/*.jsonl --config runs/x/config.yaml --against.name larger

The judge is that of the configuration; `--repeats` of its verdicts, each with other seeds, are compared with one
another. Any `--against.key`, which overrides `judge.key`, makes a second judge, with whose ranking the first one's is
compared, and by whom it is calibrated. Prints Markdown, and the same figures as JSON in the last line.

Exit codes: 0 done, 2 a mistake of the user's, 1 any other error, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from negotiator.config import (
    Config,
    JudgeConfig,
    OneSentenceParser,
    add_config_arguments,
    config_overrides,
    load_config,
)
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.judges import LocalJudge, make_judges
from negotiator.judges.quality import (
    Calibration,
    Comparison,
    Items,
    Verdicts,
    calibrate_agreement,
    calibrate_scores,
    compare_agreement,
    compare_scores,
    judge_all,
    load_transcripts,
    repeated,
    sample,
)
from negotiator.models import choose_device, choose_dtype, load_model, load_tokenizer
from negotiator.prompts.templates import Templates


class Progress:
    """A line on stderr every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._shown = total, 0, time.monotonic()

    def verdict(self) -> None:
        self._done += 1
        if time.monotonic() - self._shown > 2:
            self._shown = time.monotonic()
            print(f"{self._done} of {self._total} verdicts", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments, config, against = _parse(sys.argv[1:] if argv is None else argv)
        dialogues = load_transcripts(arguments.transcripts, config.data.dilemmas, config.data.personas)
        items = sample(dialogues, arguments.sample, config.seed)
        if not items.rounds and not items.completions:
            raise ValueError("these transcripts hold nothing to judge")
        first, second = asyncio.run(_judge(items, config, against, arguments.repeats))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # an endpoint that refuses, a budget that is spent, a plug-in that raises
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    figures = _figures(first, second)
    print("\n".join(_markdown(figures, items, config.judge, against)))
    print(json.dumps({name: dataclasses.asdict(figure) for name, figure in figures.items()}, allow_nan=False))
    return 0


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Config, JudgeConfig | None]:
    """(arguments, configuration with the judge, the second judge)."""
    parser = OneSentenceParser(prog="python -m negotiator.judges", description="Looks after judges.")
    commands = parser.add_subparsers(required=True, parser_class=OneSentenceParser)
    quality = commands.add_parser(
        "quality",
        help="judge transcripts of runs again",
        description="Compares a judge's verdicts on transcripts of runs with its own and with a second judge's.",
        usage="%(prog)s TRANSCRIPTS... [--config FILE] [--sample N] [--repeats N] [--section.key VALUE ...] "
        "[--against.key VALUE ...]",
    )
    quality.add_argument("transcripts", nargs="+", type=Path, help="files runs/<name>/transcripts/step-*.jsonl")
    quality.add_argument("--config", type=Path, help="YAML file, for instance the run's; defaults when left out")
    quality.add_argument("--sample", type=_positive, default=100, help="dialogues judged (default: 100)")
    quality.add_argument("--repeats", type=_positive, default=2, help="verdicts on each item (default: 2)")
    second = quality.add_argument_group("second judge")
    for key in JudgeConfig.model_fields:
        second.add_argument(
            f"--against.{key}", metavar="VALUE", default=argparse.SUPPRESS, type=yaml.safe_load, help=f"judge.{key}"
        )
    add_config_arguments(quality)
    arguments = parser.parse_args(argv)
    own = config_overrides(arguments)
    config = load_config(arguments.config, own)
    given = {key: value for key, value in vars(arguments).items() if key.startswith("against.")}
    if not given:
        return arguments, config, None
    overrides = {f"judge.{key.removeprefix('against.')}": value for key, value in given.items()}
    return arguments, config, load_config(arguments.config, own | overrides).judge


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


async def _judge(
    items: Items, config: Config, against: JudgeConfig | None, repeats: int
) -> tuple[list[Verdicts], Verdicts | None]:
    """(the judge's verdicts, once for each repetition, the second judge's)."""
    passes = [(config.judge, repetition) for repetition in range(repeats)] + ([(against, 0)] if against else [])
    progress = Progress(len(passes) * (len(items.rounds) + len(items.completions)))
    engine, templates = None, None
    if any("local" in (judge.agreement, judge.reward) for judge, _ in passes):
        engine, templates = _local_model(config)
    verdicts = []
    for judge, repetition in passes:
        local = LocalJudge(engine, templates, judge.agree_threshold) if engine and templates else None
        judges = make_judges(judge, local, None, repetition)
        if local in judges:
            assert local is not None
            await local.warm()
        try:
            verdicts.append(await judge_all(items, judges, progress.verdict))
        finally:
            for used in judges:
                if used is not local:  # whose engine the next one goes on with
                    await used.close()
    if engine:
        await engine.close()
    return verdicts[:repeats], verdicts[repeats] if against else None


def _local_model(config: Config) -> tuple[EmbeddedEngine, Templates]:
    device = choose_device(config.model.device)
    dtype, why = choose_dtype(config.model.dtype, device)
    print(
        f"loading {config.model.path} on {device.type} in {str(dtype).removeprefix('torch.')} ({why})", file=sys.stderr
    )
    model = load_model(config.model.path, device, dtype).requires_grad_(False)
    return EmbeddedEngine(model, config.engine), Templates(load_tokenizer(config.model.path))


def _figures(first: Sequence[Verdicts], second: Verdicts | None) -> dict[str, Comparison | Calibration]:
    figures: dict[str, Comparison | Calibration] = {}
    if len(first) > 1:
        figures["retest_agreement"] = compare_agreement(repeated([verdicts.rounds for verdicts in first]))
        figures["retest_score"] = compare_scores(repeated([verdicts.completions for verdicts in first]))
    if second:
        rounds = list(zip(first[0].rounds, second.rounds, strict=True))
        completions = list(zip(first[0].completions, second.completions, strict=True))
        figures["against_agreement"] = compare_agreement(rounds)
        figures["against_score"] = compare_scores(completions)
        figures["calibration_agreement"] = calibrate_agreement(rounds)
        figures["calibration_score"] = calibrate_scores(completions)
    return figures


def _markdown(
    figures: dict[str, Comparison | Calibration], items: Items, judge: JudgeConfig, against: JudgeConfig | None
) -> Iterator[str]:
    yield "# Judge quality"
    yield f"\n{len(items.rounds)} rounds (do they agree?) and {len(items.completions)} completions (0 to 5)."
    yield f"Judge: {_who(judge)}."
    if against:
        yield f"Second judge: {_who(against)}."
    for kind, title in (("retest", "Against itself"), ("against", "Against the second judge")):
        if f"{kind}_agreement" not in figures:
            continue
        yield f"\n## {title}\n"
        yield "| | items | failed | same | mean difference | Cohen's kappa | Spearman | Kendall tau-b |"
        yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
        for what in ("agreement", "score"):
            row = figures[f"{kind}_{what}"]
            assert isinstance(row, Comparison)
            numbers = (row.same, row.difference, row.kappa, row.spearman, row.kendall)
            yield f"| {what} | {row.items} | {row.failed} | {' | '.join(map(_number, numbers))} |"
    for what, shown in (("agreement", "P(agree)"), ("score", "score")):
        table = figures.get(f"calibration_{what}")
        if not isinstance(table, Calibration):
            continue
        yield f"\n## Calibration of the {what}\n"
        yield f"| {shown} | items | mean | second judge's mean |"
        yield "| --- | --- | --- | --- |"
        for own in table.bins:
            if own.items:
                yield f"| {own.low:g} to {own.high:g} | {own.items} | {own.mean:.3f} | {own.reference:.3f} |"
        yield f"\nExpected calibration error: {_number(table.error)}"
    yield ""


def _who(judge: JudgeConfig) -> str:
    def one(role: str) -> str:
        kind: Any = getattr(judge, role)
        return f"{getattr(judge, f'{role}_name') or judge.name} at {judge.url}" if kind == "openai" else str(kind)

    return f"agreement {one('agreement')}, score {one('reward')}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
