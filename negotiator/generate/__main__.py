"""Writes new data: dilemmas, persona pairs, or evaluation items (conflicts, or open questions).

    python -m negotiator.generate dilemmas --count 100 --out my.jsonl --url https://host/v1 --name MODEL
    python -m negotiator.generate personas --count 10 --out pairs.jsonl
    python -m negotiator.generate eval --set open --count 50 --out open.jsonl

Without --url the local model writes. The filters look at form alone: what a small model writes passes, and makes little
sense. Ended by anything at any moment, the same command goes on where it was; refused answers are beside the file, each
with its reason.

Exit codes: 0 all items are there, 1 it gave up before, 2 a mistake of the user's, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from negotiator.config import Config, EndpointConfig, ModelConfig, OneSentenceParser, Section, load_config
from negotiator.generate.filters import REASONS
from negotiator.generate.items import Kind
from negotiator.generate.production import Production, Shelf, answers_path, refused_path
from negotiator.generate.writers import EndpointWriter, LocalWriter, Writer

LINE_EVERY_S = 10.0  # where there is no terminal for a bar


class Display:
    """A bar on a terminal, now and then a line anywhere else."""

    def __init__(self, production: Production) -> None:
        self._production = production
        self._console = Console(highlight=False)
        self.bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[counts]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self.bar.add_task("", total=production.count, completed=production.kept, counts=counts(production))

    def update(self) -> None:
        self.bar.update(self._task, completed=self._production.kept, counts=counts(self._production))

    async def lines(self) -> None:
        """Until it is cancelled."""
        while not self._console.is_terminal:
            await asyncio.sleep(LINE_EVERY_S)
            print(f"{self._production.kept}/{self._production.count}  {counts(self._production)}", flush=True)


def counts(production: Production) -> str:
    often = ", ".join(f"{reason} {n}" for reason, n in production.shelf.refused.most_common(3))
    return f"refused {production.shelf.refused.total()}" + (f" ({often})" if often else "")


def report(production: Production, out: Path) -> Iterator[str]:
    """All that the files hold, also from earlier runs."""
    refused, kept = production.shelf.refused, len(production.shelf.kept)
    asked = kept + refused.total() + production.unanswered
    yield f"asked {asked}, kept {kept} of {production.count}, refused {refused.total()}"
    for reason in REASONS:
        if refused[reason]:
            yield f"  {reason}: {refused[reason]}"
    if production.unanswered:
        yield f"without an answer in this run: {production.unanswered}"
    cells = production.cells()
    categories: Counter[str] = Counter()
    for cell, (have, _) in cells.items():
        categories[cell.category] += have
    if len(categories) > 1:
        yield "by category: " + ", ".join(f"{category} {n}" for category, n in sorted(categories.items()))
    haves = [have for have, _ in cells.values()]
    yield f"by cell: {len(cells)} cells with {min(haves)} to {max(haves)} items each"
    if short := [f"{cell} {have} of {share}" for cell, (have, share) in cells.items() if have < share]:
        yield f"  short: {'; '.join(short[:20])}" + (f"; and {len(short) - 20} more" if len(short) > 20 else "")
    yield "the filters look at form alone: read some of the items before you use them"
    yield f"items: {out}" + (f", refused answers: {refused_path(out)}" if refused else "")
    if production.stopped:
        yield f"stopped: {production.stopped}"
    if production.given_up:
        yield (
            f"gave up {production.given_up} items after {production.tries} tries each: "
            "raise --tries, or go on with another --seed or model"
        )


def parse_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = OneSentenceParser(
        prog="python -m negotiator.generate",
        description="Writes new dilemmas, persona pairs or evaluation items in the format of the shipped ones.",
        usage="%(prog)s dilemmas|personas|eval --count N --out FILE [--url URL --name MODEL] [option ...]",
    )
    parser.add_argument("kind", choices=("dilemmas", "personas", "eval"))
    parser.add_argument("--set", choices=("conflict", "open"), help="eval: which of the two sets (default: conflict)")
    parser.add_argument("--count", type=int, required=True, metavar="N", help="items that the file is to hold")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file, continued if it exists")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all requests (default: %(default)s)")
    parser.add_argument(
        "--tries", type=int, default=10, metavar="N", help="most answers for each item (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.9, metavar="T", help="sampling temperature (default: %(default)s)"
    )
    sections: dict[str, tuple[type[Section], str]] = {"judge": (EndpointConfig, ""), "model": (ModelConfig, "model.")}
    names = {}
    for section, (fields, prefix) in sections.items():
        group = parser.add_argument_group("endpoint" if section == "judge" else "local model, without --url")
        for name, field in fields.model_fields.items():
            names[f"{prefix}{name}"] = f"{section}.{name}"
            described = str(field.description).removeprefix("openai: ").replace("%", "%%")
            group.add_argument(
                f"--{prefix}{name}",
                type=yaml.safe_load,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{described} (default: {field.default})",
            )
    arguments = parser.parse_args(argv)
    given = {key: value for key, value in vars(arguments).items() if key in names}
    if arguments.set and arguments.kind != "eval":
        parser.error("--set is for eval")
    if min(arguments.count, arguments.tries) < 1 or arguments.temperature < 0:
        parser.error("--count and --tries have to be positive, and --temperature must not be negative")
    if {"url", "name"} & given.keys() and not {"url", "name"} <= given.keys():
        parser.error("an endpoint needs --url and --name")
    other = {key for key in given if key.startswith("model.") == ("url" in given)}
    if other:
        wanted = "the local model" if "url" in given else "an endpoint, which needs --url and --name"
        parser.error(f"--{min(other)} is for {wanted}")
    return arguments, load_config(None, {names[key]: value for key, value in given.items()})


async def produce(production: Production, display: Display) -> None:
    lines = asyncio.create_task(display.lines())
    try:
        await production.run()
    finally:
        lines.cancel()
        await production.writer.close()


def start(arguments: argparse.Namespace, config: Config) -> Production:
    """Raises ValueError or OSError with one sentence for whatever the user has to change."""
    kind: Kind = arguments.kind
    if arguments.kind == "eval":
        kind = "eval_open" if arguments.set == "open" else "eval_conflict"
    shelf = Shelf(kind, arguments.out)
    for path in shelf.torn:
        print(f"{path}: the last line was cut short and is left out", flush=True)
    writer: Writer
    if config.judge.url:
        writer = EndpointWriter(config.judge, answers_path(arguments.out))
    else:
        print(f"loading {config.model.path} ...", flush=True)
        writer = LocalWriter(config)
    production = Production(
        kind, arguments.count, arguments.seed, arguments.tries, arguments.temperature, writer, shelf
    )
    print(f"{production.kept} of {production.count} {kind} are there; text from {writer.path}", flush=True)
    return production


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments, config = parse_arguments(argv)
        production = start(arguments, config)
        display = Display(production)
        production.changed = display.update
        interrupted = False
        try:
            with display.bar:
                asyncio.run(produce(production, display))
        except KeyboardInterrupt:
            interrupted = True
        print("\n".join(report(production, arguments.out)), flush=True)
        production.shelf.close()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if interrupted:
        print("interrupted: the same command goes on from here", flush=True)
        return 130
    return 0 if production.kept == production.count else 1


if __name__ == "__main__":
    sys.exit(main())
