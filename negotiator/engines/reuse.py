"""How many prompt tokens a perfect prefix cache would reuse: what an engine's cached tokens are measured against."""

from __future__ import annotations

from collections.abc import Sequence

from negotiator.engines.radix import RadixTree


class PerfectCache:
    """Holds every sequence of one weight version for ever, wherever it was computed."""

    def __init__(self) -> None:
        self._tree = RadixTree()

    def reusable(self, prompt_ids: Sequence[int]) -> int:
        """Leading tokens of a prompt that are held. The last one never counts: its output is what is asked for."""
        return len(self._tree.match(prompt_ids[:-1])[0])

    def hold(self, ids: Sequence[int]) -> None:
        """Keeps a sequence that was computed."""
        self._tree.insert(ids, range(len(ids)))  # slots mean nothing here
