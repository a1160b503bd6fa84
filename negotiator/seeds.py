"""Every random stream of a run has its own seed, derived from what it is for; no generator is carried along."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2**63) that depends on every part, its type and its place; equal on every machine and version.

    The parts say what the seed is for: `derive_seed(run_seed, "utterance", step, scenario, dialogue, turn)`.
    """
    encoded = bytearray()
    for part in parts:
        body = str(part).encode()
        # The length keeps ("ab", "c") apart from ("a", "bc"), the tag 1 apart from "1".
        encoded += b"%c%d:%b" % (b"s" if isinstance(part, str) else b"i", len(body), body)
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big") >> 1
