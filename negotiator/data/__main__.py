"""`python -m negotiator.data check [FILE...]`: reads data files, and says what they hold and what is there twice.

Without FILE it checks the shipped ones. Lines with a "text" are dilemmas, or questions if they have a "topic"; lines
with an "a" and a "b" are persona pairs, and with a "text" as well conflicts. A file that cannot be used ends it with
one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from negotiator import data
from negotiator.data.likeness import TOO_CLOSE, normalized, similar_pairs

LISTED = 10  # near-duplicates that are named, the closest first


@dataclass(frozen=True, slots=True)
class Passages:
    """All texts of one kind in a file, such as its dilemmas or its personas, each with the id that names it."""

    what: str
    ids: Sequence[str]
    texts: Sequence[str]


def _report(path: Path) -> tuple[list[str], list[Passages]]:
    """What to say about a file, and its texts."""
    records = data.read_records(path)
    fields = records[0].fields
    lines, found = [], []
    if "text" in fields or "a" not in fields:
        what = "conflicts" if "a" in fields else "questions" if "topic" in fields else "dilemmas"
        dilemmas = data.load_dilemmas(path)
        texts = Passages(what, [d.id for d in dilemmas], [d.text for d in dilemmas])
        lines += [f"{path}: {len(dilemmas)} {what} {_lengths(texts)}", *_repeats(texts)]
        lines += _balance("topic", [r.text("topic", default="") for r in records])
        lines += _balance("category", [d.category for d in dilemmas])
        lines += _balance("domain", [d.domain for d in dilemmas])
        found.append(texts)
    if "a" in fields:
        pairs = data.load_personas(path)
        sides = [(f"{pair.id}.{side}", getattr(pair, side)) for pair in pairs for side in ("a", "b")]
        texts = Passages("personas", [item for item, _ in sides], [persona.text for _, persona in sides])
        lines += [f"{path}: {len(pairs)} persona pairs {_lengths(texts)}", *_repeats(texts)]
        lines += _same("tension", [pair.id for pair in pairs], [pair.tension for pair in pairs])
        lines += _same("name", [item for item, _ in sides], [persona.name for _, persona in sides])
        found.append(texts)
    sources = [record.fields.get("source") for record in records]
    models = [str(source["model"]) for source in sources if isinstance(source, dict) and "model" in source]
    return lines + _balance("written by", models), found


def _lengths(passages: Passages) -> str:
    words = sorted(len(text.split()) for text in passages.texts)
    return f"of {words[0]} to {words[-1]} words, median {words[len(words) // 2]}"


def _repeats(passages: Passages) -> list[str]:
    """Texts that are there twice, or nearly so."""
    first: dict[str, str] = {}
    for item, text in zip(passages.ids, passages.texts, strict=True):
        first.setdefault(normalized(text), item)
    return _same("text", passages.ids, passages.texts) + _near(list(first.values()), similar_pairs(list(first)))


def _same(what: str, ids: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Those that differ in no more than case, punctuation and spacing."""
    first: dict[str, str] = {}
    holders = [(first.setdefault(normalized(text), item), item) for item, text in zip(ids, texts, strict=True) if text]
    return [f"  same {what}: {one} and {other}" for one, other in holders if one != other]


def _near(ids: Sequence[str], similar: Iterable[tuple[float, int, int]]) -> list[str]:
    pairs = sorted(similar, key=lambda pair: (-pair[0], *pair[1:]))
    near = [pair for pair in pairs if pair[0] >= TOO_CLOSE]
    lines = [f"  near-duplicates (3-gram Jaccard of {TOO_CLOSE} or more): {len(near)}"]
    lines += [f"    {similarity:.3f} {ids[i]} and {ids[j]}" for similarity, i, j in near[:LISTED]]
    if pairs and not near:
        similarity, i, j = pairs[0]
        lines[0] += f", closest {similarity:.3f} ({ids[i]} and {ids[j]})"
    return lines


def _balance(field: str, values: Sequence[str]) -> list[str]:
    counts = Counter(value for value in values if value)
    if len(counts) > 8:
        return [f"  {field}: {len(counts)} values, {min(counts.values())} to {max(counts.values())} items each"]
    return [f"  {field}: " + ", ".join(f"{value} {n}" for value, n in counts.most_common())] if counts else []


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m negotiator.data", description="Looks after data files.")
    check = parser.add_subparsers(required=True).add_parser("check", help="validate files and describe them")
    check.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSONL file; the shipped ones when left out")
    try:
        files = parser.parse_args(argv).files or list(data.SHIPPED.values())
        whole: list[tuple[Path, str, str]] = []  # file, id, text
        for path in files:
            lines, found = _report(path)
            print("\n".join(lines))
            whole += [(path, item, text) for p in found for item, text in zip(p.ids, p.texts, strict=True)]
        if len(files) > 1:
            similar = similar_pairs([text for _, _, text in whole])
            print("across files")
            print("\n".join(_near([i for _, i, _ in whole], (s for s in similar if whole[s[1]][0] != whole[s[2]][0]))))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
