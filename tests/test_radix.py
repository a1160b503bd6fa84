"""The radix tree against a model that is a plain dict of prefixes."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from negotiator.engines.radix import RadixNode, RadixTree

Prefix = tuple[int, ...]


class NaiveCache:
    """The same contract, one dict entry per held prefix: its slot, when it was last used, how often it is locked."""

    def __init__(self) -> None:
        self.slot: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.locks: dict[Prefix, int] = {}
        self.clock = 0

    def match(self, tokens: Prefix) -> list[int]:
        self.clock += 1
        held: list[int] = []
        for n in range(1, len(tokens) + 1):
            if tokens[:n] not in self.slot:
                break
            held.append(self.slot[tokens[:n]])
            self.used[tokens[:n]] = self.clock
        return held

    def insert(self, tokens: Prefix, slots: list[int]) -> list[int]:
        held = self.match(tokens)
        for n in range(len(held) + 1, len(tokens) + 1):
            self.slot[tokens[:n]], self.used[tokens[:n]], self.locks[tokens[:n]] = slots[n - 1], self.clock, 0
        return held + slots[len(held) :]

    def add_locks(self, tokens: Prefix, change: int) -> None:
        for n in range(1, len(tokens) + 1):
            self.locks[tokens[:n]] += change

    def evict(self, count: int) -> list[int]:
        freed = []
        for _ in range(count):
            parents = {p[:-1] for p in self.slot}
            victim = min((p for p in self.slot if p not in parents and not self.locks[p]), key=lambda p: self.used[p])
            freed.append(self.slot.pop(victim))
        return freed

    @property
    def evictable(self) -> int:
        return sum(not self.locks[p] for p in self.slot)


class RadixMachine(RuleBasedStateMachine):
    locked: Bundle[tuple[RadixNode, Prefix]] = Bundle("locked")
    sequences = st.lists(st.integers(0, 2), max_size=8).map(tuple)

    @initialize()
    def build(self) -> None:
        self.tree, self.naive, self.next_slot = RadixTree(), NaiveCache(), 0

    @rule(tokens=sequences)
    def match(self, tokens: Prefix) -> None:
        assert self.tree.match(tokens)[0] == self.naive.match(tokens)

    @rule(tokens=sequences)
    def insert(self, tokens: Prefix) -> None:
        slots = list(range(self.next_slot, self.next_slot + len(tokens)))
        self.next_slot += len(tokens)
        assert self.tree.insert(tokens, slots)[0] == self.naive.insert(tokens, slots)

    @rule(target=locked, tokens=sequences)
    def lock(self, tokens: Prefix) -> tuple[RadixNode, Prefix]:
        slots, node = self.tree.match(tokens)
        self.tree.lock(node)
        held = tokens[: len(self.naive.match(tokens))]
        assert len(slots) == len(held)
        self.naive.add_locks(held, 1)
        return node, held

    @rule(lock=consumes(locked))
    def unlock(self, lock: tuple[RadixNode, Prefix]) -> None:
        node, held = lock
        self.tree.unlock(node)
        self.naive.add_locks(held, -1)

    @rule(data=st.data())
    def evict(self, data: Any) -> None:
        count = data.draw(st.integers(0, self.naive.evictable))
        # The tree frees the run it cuts in one piece, the model token by token: compare as sets.
        assert sorted(self.tree.evict(count)) == sorted(self.naive.evict(count))

    @invariant()
    def counts_agree(self) -> None:
        if hasattr(self, "tree"):
            assert (self.tree.size, self.tree.evictable) == (len(self.naive.slot), self.naive.evictable)


TestRadix = RadixMachine.TestCase
TestRadix.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_clear_returns_every_slot_once() -> None:
    tree = RadixTree()
    tree.insert((1, 2, 3), [10, 11, 12])
    tree.insert((1, 2, 4, 5), [20, 21, 22, 23])  # 20 and 21 stay with the caller
    assert sorted(tree.clear()) == [10, 11, 12, 22, 23]
    assert tree.size == tree.evictable == 0
    assert tree.match((1, 2, 3))[0] == []
