"""Keys and values of many sequences in one pool: who holds which slot, and the attention that reads them there.

    T    tokens in the forward pass    S  sequences in it
    Hq   query heads                   Hkv key/value heads    D head dimension
    slot place of one token in the pool, the same in every layer

A slot is free, or owned by the radix tree (for anyone whose tokens begin that way), or owned by one sequence under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from negotiator.engines.radix import RadixNode, RadixTree
from negotiator_kernels import paged_attention


@dataclass(eq=False, slots=True)
class Reservation:
    """The slots of a sequence under way, for all the tokens it will ever have."""

    slots: NDArray[np.int64]
    shared: int  # this many leading slots are the tree's, on the locked path that ends with `node`
    node: RadixNode


class KVCache:
    """`keys` and `values` [layers, num_slots, Hkv, D], in the model's dtype and on its device."""

    def __init__(self, model: PreTrainedModel, num_slots: int) -> None:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

        shape = (config.num_hidden_layers, num_slots, heads, head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        self.num_slots = num_slots
        self._tree = RadixTree()
        self._free = list(reversed(range(num_slots)))  # a stack: memory never used is never touched

    @property
    def available(self) -> int:
        """Slots that are free, or would be after evicting all that nobody reads."""
        return len(self._free) + self._tree.evictable

    def reserve(self, tokens: Sequence[int], capacity: int) -> Reservation | None:
        """Slots for `capacity` tokens, the first of them with what is cached of `tokens`; None if there is no room."""
        held, node = self._tree.match(tokens)
        self._tree.lock(node)
        missing = capacity - len(held)
        if missing > self.available:
            self._tree.unlock(node)
            return None
        self._free += self._tree.evict(max(missing - len(self._free), 0))
        new = [self._free.pop() for _ in range(missing)]
        return Reservation(np.array(held + new, dtype=np.int64), len(held), node)

    def share(self, reservation: Reservation, tokens: Sequence[int]) -> None:
        """Caches `tokens`, whose keys and values are in the reservation's first slots.

        Of those that another sequence cached meanwhile, the reservation takes over the other's slots.
        """
        old = reservation.slots[: len(tokens)].tolist()
        new, node = self._tree.insert(tokens, old)
        self._tree.lock(node)
        self._tree.unlock(reservation.node)
        self._free += [a for a, b in zip(old, new, strict=True) if a != b]
        reservation.slots[: len(tokens)] = new
        reservation.shared, reservation.node = len(tokens), node

    def release(self, reservation: Reservation) -> None:
        """Ends a reservation; what it shared stays cached."""
        self._tree.unlock(reservation.node)
        self._free += reservation.slots[reservation.shared :].tolist()

    def clear(self) -> None:
        """Forgets everything. Nothing may be reserved."""
        self._free += self._tree.clear()
        assert len(self._free) == self.num_slots, "slots have leaked"
        self._free.sort(reverse=True)


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """Writes the keys and values of new tokens to the cache, then lets each token see its sequence so far.

    The tokens of sequence s are query_starts[s] .. query_starts[s+1]; they are the last of the sequence's tokens,
    which lie in slots[slot_starts[s] .. slot_starts[s+1]], in order.
    """

    cache: KVCache
    new_slots: torch.Tensor  # [T] int64, where the keys and values of this pass go
    slots: torch.Tensor  # [all tokens of all sequences] int64
    slot_starts: torch.Tensor  # [S+1] int64, on the CPU
    query_starts: torch.Tensor  # [S+1] int64, on the CPU

    @staticmethod
    def build(cache: KVCache, work: Sequence[tuple[Reservation, int, int]]) -> PagedLayout:
        """The layout of a pass over tokens start .. end of each (reservation, start, end)."""

        device = cache.keys.device
        return PagedLayout(
            cache,
            new_slots=torch.from_numpy(np.concatenate([r.slots[start:end] for r, start, end in work])).to(device),
            slots=torch.from_numpy(np.concatenate([r.slots[:end] for r, _, end in work])).to(device),
            slot_starts=torch.tensor([0] + [end for _, _, end in work]).cumsum(0),
            query_starts=torch.tensor([0] + [end - start for _, start, end in work]).cumsum(0),
        )

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of one layer: q [1, Hq, T, D], k and v [1, Hkv, T, D] -> [1, T, Hq, D]."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        k, v = k[0].transpose(0, 1), v[0].transpose(0, 1)
        if k.shape[1:] != keys.shape[1:] or v.shape[1:] != values.shape[1:]:
            raise ValueError(
                f"the model's keys and values are {tuple(k.shape[1:])} and {tuple(v.shape[1:])} a token, "
                f"its config says {tuple(keys.shape[1:])}; choose a model with ordinary (grouped-query) attention"
            )
        keys.index_copy_(0, self.new_slots, k)
        values.index_copy_(0, self.new_slots, v)
        q = q[0].transpose(0, 1).contiguous()
        out: torch.Tensor = paged_attention(q, keys, values, self.slots, self.slot_starts, self.query_starts, scale)
        return out[None]
