"""`python -m negotiator.data check [FILE...]`: reads data files, and says what they hold and how alike their items are.

Without FILE it checks the shipped ones. Lines with a "text" are dilemmas, lines with an "a" and a "b" persona pairs.
A file that cannot be used ends it with one sentence and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from negotiator import data


def closest_pair(texts: Sequence[str]) -> tuple[float, int, int]:
    """(highest Jaccard similarity of the word-3-gram sets of two texts, and their places); zeros if none share any."""
    grams = [_trigrams(text) for text in texts]
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    shared: Counter[tuple[int, int]] = Counter()
    for index, own in enumerate(grams):
        for gram in own:
            shared.update((other, index) for other in holders[gram])
            holders[gram].append(index)
    return max(((n / (len(grams[i]) + len(grams[j]) - n), i, j) for (i, j), n in shared.items()), default=(0.0, 0, 0))


def _trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


def _report(path: Path) -> Iterator[str]:
    fields = data.read_records(path)[0].fields
    if "a" in fields:
        pairs = data.load_personas(path)
        yield f"{path}: {len(pairs)} persona pairs"
        personas = [(f"{pair.id}.{side}", getattr(pair, side).text) for pair in pairs for side in ("a", "b")]
        yield from _likeness(*zip(*personas, strict=True))
    if "a" not in fields or "text" in fields:
        dilemmas = data.load_dilemmas(path)
        words = sorted(len(d.text.split()) for d in dilemmas)
        yield f"{path}: {len(dilemmas)} dilemmas of {words[0]} to {words[-1]} words"
        yield from _likeness([d.id for d in dilemmas], [d.text for d in dilemmas])
        yield from _balance("category", [d.category for d in dilemmas])
        yield from _balance("domain", [d.domain for d in dilemmas])


def _likeness(ids: Sequence[str], texts: Sequence[str]) -> Iterator[str]:
    first: dict[str, str] = {}
    for item, text in zip(ids, texts, strict=True):
        if first.setdefault(text, item) != item:
            yield f"  same text: {first[text]} and {item}"
    similarity, i, j = closest_pair(list(first))
    yield f"  highest 3-gram Jaccard between different texts: {similarity:.3f}" + (
        f" ({first[list(first)[i]]} and {first[list(first)[j]]})" if similarity else ""
    )


def _balance(field: str, values: Sequence[str]) -> Iterator[str]:
    counts = Counter(value for value in values if value)
    if len(counts) > 8:
        yield f"  {field}: {len(counts)} values, {min(counts.values())} to {max(counts.values())} items each"
    elif counts:
        yield f"  {field}: " + ", ".join(f"{value} {n}" for value, n in counts.most_common())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m negotiator.data", description="Looks after data files.")
    check = parser.add_subparsers(required=True).add_parser("check", help="validate files and describe them")
    check.add_argument("files", nargs="*", type=Path, metavar="FILE", help="JSONL file; the shipped ones when left out")
    try:
        for path in parser.parse_args(argv).files or data.SHIPPED.values():
            print("\n".join(_report(path)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
