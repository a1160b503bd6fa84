"""A prefix cache: token sequences to the slots that hold their keys and values.

A radix tree whose edges are runs of tokens. Each token on a path owns one slot of the key/value pool; sequences with a
common prefix share the slots of that prefix. What a running request reads is locked; of the rest, the tokens used
longest ago, deepest first, give way when room is needed. Everything is exact to the token and deterministic.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence


class RadixNode:
    """A run of tokens below `parent`, their slots, and the nodes that continue it, by first token."""

    __slots__ = ("children", "last_used", "locks", "parent", "slots", "tokens")

    def __init__(self, tokens: tuple[int, ...], slots: list[int], parent: RadixNode | None, last_used: int) -> None:
        self.tokens = tokens
        self.slots = slots
        self.parent = parent
        self.last_used = last_used
        self.locks = 0  # locks held on this node or below it
        self.children: dict[int, RadixNode] = {}


class RadixTree:
    """`size` tokens are held; the `evictable` ones among them are not locked."""

    def __init__(self) -> None:
        self._root = RadixNode((), [], None, 0)
        self._clock = 0
        self.size = 0
        self.evictable = 0

    def clear(self) -> list[int]:
        """Forgets everything and returns its slots. Nothing may be locked."""
        assert self.size == self.evictable, "cleared while something is locked"
        return self.evict(self.size)

    def match(self, tokens: Sequence[int]) -> tuple[list[int], RadixNode]:
        """The slots of the longest prefix of `tokens` that is held, and the node it ends with, to be locked."""
        node, slots = self._root, []
        for node in self._walk(tuple(tokens)):
            slots += node.slots
        return slots, node

    def insert(self, tokens: Sequence[int], slots: Sequence[int]) -> tuple[list[int], RadixNode]:
        """Holds `tokens`; returns the slots that serve them now, and the node they end with.

        Tokens already held keep the slots they have: where the result differs from `slots`, the caller keeps its own.
        """
        assert len(tokens) == len(slots)
        held, node = self.match(tokens)
        done = len(held)
        if done < len(tokens):
            leaf = RadixNode(tuple(tokens[done:]), list(slots[done:]), node, self._clock)
            node.children[leaf.tokens[0]] = leaf
            self.size += len(leaf.tokens)
            self.evictable += len(leaf.tokens)
            node = leaf
        return held + list(slots[done:]), node

    def lock(self, node: RadixNode) -> None:
        """Keeps the path that ends with `node` until it is unlocked as often as it was locked."""
        while node.parent is not None:
            if node.locks == 0:
                self.evictable -= len(node.tokens)
            node.locks += 1
            node = node.parent

    def unlock(self, node: RadixNode) -> None:
        while node.parent is not None:
            assert node.locks > 0, "unlocked more often than locked"
            node.locks -= 1
            if node.locks == 0:
                self.evictable += len(node.tokens)
            node = node.parent

    def evict(self, count: int) -> list[int]:
        """Forgets `count` unlocked tokens, the least recently used first, and returns their slots."""
        assert count <= self.evictable, "more to evict than is unlocked"
        # No two leaves are ever used at the same time, so that the order is total.
        leaves = [(n.last_used, n) for n in self._nodes() if not n.children and n.locks == 0]
        heapq.heapify(leaves)
        freed: list[int] = []
        while len(freed) < count:
            _, leaf = heapq.heappop(leaves)
            keep = max(len(leaf.tokens) - (count - len(freed)), 0)
            freed += leaf.slots[keep:]
            if keep:
                leaf.tokens, leaf.slots = leaf.tokens[:keep], leaf.slots[:keep]
                continue
            parent = leaf.parent
            assert parent is not None
            del parent.children[leaf.tokens[0]]
            if parent.parent is not None and not parent.children and parent.locks == 0:
                heapq.heappush(leaves, (parent.last_used, parent))
        self.size -= count
        self.evictable -= count
        return freed

    def _walk(self, tokens: tuple[int, ...]) -> Iterator[RadixNode]:
        """Nodes along the longest held prefix of `tokens`, now just used; the last is cut to end where it does."""
        self._clock += 1
        node, done = self._root, 0
        while done < len(tokens) and (child := node.children.get(tokens[done])) is not None:
            common = _common_prefix(child.tokens, tokens[done : done + len(child.tokens)])
            node = child if common == len(child.tokens) else self._split(child, common)
            node.last_used = self._clock
            done += common
            yield node

    def _split(self, node: RadixNode, at: int) -> RadixNode:
        """Puts a new node with the first `at` tokens above `node`, which keeps the rest and whoever points at it."""
        parent = node.parent
        assert parent is not None, "the root is never split"
        upper = RadixNode(node.tokens[:at], node.slots[:at], parent, node.last_used)
        upper.locks = node.locks
        upper.children[node.tokens[at]] = node
        parent.children[upper.tokens[0]] = upper
        node.tokens, node.slots, node.parent = node.tokens[at:], node.slots[at:], upper
        return upper

    def _nodes(self) -> Iterator[RadixNode]:
        pending = list(self._root.children.values())
        while pending:
            node = pending.pop()
            pending += node.children.values()
            yield node


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Number of leading items that agree."""
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
