"""What is judged, quoted so that it cannot pass for instructions.

The prompts put each text between marks, <<<solution 5f0c...>>> and <<<end of solution 5f0c...>>>. Their number is a
hash of all texts of the request: the same request has the same one, for the cache, and a text that held its own would
be hard to find. Nor does a quoted text hold any bracket of the kind that marks are made of, or anything invisible. That
also takes away the control tokens of chat templates, which some servers read anywhere in a message.

A second part of the hash is the code. It stands in the instructions alone, and an answer without it is refused: that
finds answers copied from a text, and judges who no longer follow their instructions. It must not be in the schema of
the answer, by which an endpoint would write it whatever the judge thinks. It cannot find a judge whom a text
persuades; there is only wording against that.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import dataclass

# Also what only looks like one of < > [ ]; compatibility forms, like those of full width, come on top in `_character`.
_OPENING = "<[‹«≪⋘⟨⟪〈《⟦⦗⧼❬❮❰⪻⊰˂ᐸ"  # noqa: RUF001 - look-alikes on purpose
_CLOSING = ">]›»≫⋙⟩⟫〉》⟧⦘⧽❭❯❱⪼⊱˃ᐳ"  # noqa: RUF001 - likewise
_ROUND = str.maketrans(dict.fromkeys(_OPENING, "(") | dict.fromkeys(_CLOSING, ")"))
_INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Cn")  # controls, formats (tags and marks of direction), private, halves, none


@dataclass(frozen=True, slots=True)
class Quoted:
    """The texts of a request by name, as they go into its prompt."""

    texts: dict[str, str]
    nonce: str  # of the marks
    code: str  # what the answer has to repeat


def quote(**texts: str) -> Quoted:
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    return Quoted({name: _plain(text) for name, text in texts.items()}, digest[:16], digest[16:24])


def _plain(text: str) -> str:
    return "\n".join("".join(map(_character, line)) for line in text.splitlines())


def _character(character: str) -> str:
    if unicodedata.category(character) in _INVISIBLE:
        return " " if character == "\t" else ""
    round_ = unicodedata.normalize("NFKC", character).translate(_ROUND)
    return round_ if set(round_) & set("()") else character
