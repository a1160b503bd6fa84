"""The radix tree against a model that is a plain dict of prefixes; the cache above it, by what lies in its slots."""

from __future__ import annotations

from typing import Any

from helpers import tiny_llama
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from negotiator.engines.kv_cache import KVCache, Reservation
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


class Sequence:
    """One under way: some of its tokens are computed, some of these shared."""

    def __init__(self, tokens: Prefix, reservation: Reservation) -> None:
        self.tokens = tokens
        self.reservation = reservation
        self.computed = reservation.shared


MODEL = tiny_llama()


class CacheMachine(RuleBasedStateMachine):
    """What lies in a slot is the prefix that was computed there: no sequence may ever see another one in its own."""

    SLOTS = 24
    running: Bundle[Sequence] = Bundle("running")
    sequences = st.lists(st.integers(0, 2), min_size=1, max_size=10).map(tuple)

    @initialize()
    def build(self) -> None:
        self.cache = KVCache(MODEL, self.SLOTS)
        self.content: dict[int, Prefix] = {}
        self.all: list[Sequence] = []

    @rule(target=running, tokens=sequences, reusable=st.integers(0, 10), more=st.integers(0, 5))
    def reserve(self, tokens: Prefix, reusable: int, more: int) -> Any:
        room = self.cache.available
        reservation = self.cache.reserve(tokens[:reusable], len(tokens) + more)
        if reservation is None:
            assert len(tokens) + more > room == self.cache.available
            return multiple()
        assert reservation.shared <= min(reusable, len(tokens))
        self.all.append(Sequence(tokens, reservation))
        return self.all[-1]

    @rule(sequence=running, count=st.integers(1, 10))
    def compute(self, sequence: Sequence, count: int) -> None:
        for n in range(sequence.computed, min(sequence.computed + count, len(sequence.tokens))):
            self.content[int(sequence.reservation.slots[n])] = sequence.tokens[: n + 1]
            sequence.computed = n + 1

    @rule(sequence=running)
    def share(self, sequence: Sequence) -> None:
        self.cache.share(sequence.reservation, sequence.tokens[: sequence.computed])
        assert sequence.reservation.shared == sequence.computed

    @rule(sequence=consumes(running))
    def release(self, sequence: Sequence) -> None:
        self.cache.release(sequence.reservation)
        self.all.remove(sequence)

    @invariant()
    def every_sequence_sees_its_own(self) -> None:
        for sequence in getattr(self, "all", ()):
            for n, slot in enumerate(sequence.reservation.slots[: sequence.computed].tolist()):
                assert self.content[slot] == sequence.tokens[: n + 1]

    @invariant()
    def every_slot_has_one_owner(self) -> None:
        if hasattr(self, "cache"):
            own = [slot for s in self.all for slot in s.reservation.slots[s.reservation.shared :].tolist()]
            tree = [slot for node in self.cache._tree._nodes() for slot in node.slots]
            assert sorted(self.cache._free + own + tree) == list(range(self.SLOTS))

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for sequence in self.all:
                self.cache.release(sequence.reservation)
            self.cache.clear()
            assert sorted(self.cache._free) == list(range(self.SLOTS))


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
