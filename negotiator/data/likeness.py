"""How alike texts are, by the word 3-grams they share, and whether a text is running English at all."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

TOO_CLOSE = 0.15  # 3-gram Jaccard from which two texts count as one told twice; between shipped ones it is below 0.08

_COMMON = (
    "a an and are as at be been but by can could did do does for from had has have he her his how i if in is it its "
    "may more my no not of on one or our out over say she should so than that the their them there they this to up "
    "was we were what when which who will with would you your"
)
_FUNCTION_WORDS = frozenset(_COMMON.split())
Gram = tuple[str, ...]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).lower())


def normalized(text: str) -> str:
    """What two texts have in common that differ only in case, punctuation and spacing."""
    return " ".join(words(text))


def trigrams(text: str) -> set[Gram]:
    found = words(text)
    return set(zip(found, found[1:], found[2:], strict=False))


class Neighbours:
    """Texts, and for a further one those that share a 3-gram with it."""

    def __init__(self, texts: Sequence[str] = ()) -> None:
        self._sizes: list[int] = []
        self._holders: defaultdict[Gram, list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        grams = trigrams(text)
        for gram in grams:
            self._holders[gram].append(len(self._sizes))
        self._sizes.append(len(grams))

    def of(self, text: str) -> list[tuple[float, int]]:
        """(Jaccard similarity, place in the order of adding) of every text that shares a 3-gram, closest first."""
        own = trigrams(text)
        shared = Counter(place for gram in own for place in self._holders.get(gram, ()))
        return sorted(
            ((n / (len(own) + self._sizes[i] - n), i) for i, n in shared.items()), key=lambda s: (-s[0], s[1])
        )


def similar_pairs(texts: Sequence[str]) -> Iterator[tuple[float, int, int]]:
    """(Jaccard similarity, places of both) for every two texts that share a 3-gram."""
    before = Neighbours()
    for place, text in enumerate(texts):
        yield from ((similarity, other, place) for similarity, other in before.of(text))
        before.add(text)


def closest_pair(texts: Sequence[str]) -> tuple[float, int, int]:
    """(highest Jaccard similarity of two texts, and their places); zeros if none share any 3-gram."""
    return max(similar_pairs(texts), default=(0.0, 0, 0))


def copied(text: str, source: str) -> float:
    """The share of the text's 3-grams that the source has as well."""
    own = trigrams(text)
    return len(own & trigrams(source)) / len(own) if own else 0.0


def alike(one: str, other: str) -> float:
    """Jaccard similarity of the words that carry meaning, whatever their order."""
    a, b = (set(words(text)) - _FUNCTION_WORDS for text in (one, other))
    return len(a & b) / len(a | b) if a | b else 1.0


def is_running_english(text: str) -> bool:
    """Whether a passage has the letters, function words and variety that every shipped one has, with room to spare.

    Shipped texts have at least 90 % letters, 25 % function words, 63 % different words, and 90 % different 3-grams.
    """
    found, characters = words(text), [c for c in text if not c.isspace()]
    if not found:
        return False
    letters = [c for c in characters if c.isalpha()]
    latin = sum(c < "\u0250" for c in letters)  # Basic Latin, and Latin with the accents of European names
    grams = list(zip(found, found[1:], found[2:], strict=False))
    return (
        len(letters) >= 0.8 * len(characters)
        and latin >= 0.97 * len(letters)
        and sum(word in _FUNCTION_WORDS for word in found) >= 0.2 * len(found)
        and len(set(found)) >= 0.5 * len(found)
        and len(set(grams)) >= 0.8 * len(grams)
    )
