"""Turn samples into micro-batches without padding, each group's prefix once.

A micro-batch is one row of T tokens: for every (scenario, agent) in it the shared prefix (persona, rules, dilemma),
then what each turn sample adds to it. Segments say what attends to what; nothing ever attends across samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch

from negotiator.types import DialogueGroup, PackedBatch, Segment, TurnSample


def turn_samples(groups: Iterable[DialogueGroup], roles: Literal["both", "agent1"]) -> list[TurnSample]:
    """Every trained utterance of every dialogue that ended, in order; failed dialogues give none."""
    return [
        TurnSample(
            prompt_ids=utterance.prompt_ids,
            response_ids=utterance.generation.ids,
            sampling_logprobs=utterance.generation.logprobs,
            advantage=dialogue.advantage,
            prefix_key=(group.scenario.index, utterance.agent),
            prefix_len=utterance.prefix_len,
        )
        for group in groups
        for dialogue in group.valid
        for utterance in dialogue.utterances
        if roles == "both" or utterance.agent == "agent1"
    ]


def pack(samples: Sequence[TurnSample], max_tokens: int, processes: int = 1) -> list[PackedBatch]:
    """Packs samples into micro-batches of at most `max_tokens` tokens; a longer sample gets one of its own.

    Micro-batches take about equally long, and their number is a multiple of `processes` where there are enough samples:
    in each round every process gets one. `sequence_ids` are the samples' places in `samples`.
    """
    numbered = sorted(enumerate(samples), key=lambda item: item[1].prefix_key)
    units = [list(members) for _, members in itertools.groupby(numbered, key=lambda item: item[1].prefix_key)]
    ways = [_balanced(units, max_tokens, processes, whole) for whole in (True, False)]
    return [_assemble(bin_) for bin_ in min(ways, key=lambda bins: _duration(bins, processes))]


def padding_batch() -> PackedBatch:
    """A micro-batch of one token that trains nothing, for a process that has run out of others."""
    return _assemble([[(0, TurnSample((0, 0), (), (), 0.0, (0, "agent1"), 1))]])


_Numbered = tuple[int, TurnSample]
_Bin = list[list[_Numbered]]  # samples by shared prefix

# Keys at which attention costs a token about as much as the matrix products do: some six times the hidden size.
KEYS_THAT_DOUBLE = 8192
HALVINGS = 30  # of the interval in which the smallest sufficient limit is looked for


def _balanced(units: Sequence[Sequence[_Numbered]], max_tokens: int, processes: int, whole: bool) -> list[_Bin]:
    """As few bins as possible, rounded up to a multiple of `processes`, the largest as small as possible."""
    bins = _fill(units, max_tokens, math.inf, whole)
    count = -(-len(bins) // processes) * processes
    low, high = 0.0, sum(map(_cost, bins))
    for _ in range(HALVINGS):
        limit = (low + high) / 2
        found = _fill(units, max_tokens, limit, whole)
        if len(found) <= count:
            high, bins = limit, found
        else:
            low = limit
    return bins


def _fill(units: Sequence[Sequence[_Numbered]], max_tokens: int, max_cost: float, whole: bool) -> list[_Bin]:
    """Bins within both limits, filled one after the other; a sample that exceeds one of them is alone in its bin.

    `whole`: samples that share a prefix stay together where a bin can hold them all.
    """
    bins: list[_Bin] = []
    tokens, cost = 0, 0.0

    def fits(more: Sequence[_Numbered], prefix_len: int, with_prefix: bool, tokens: int, cost: float) -> bool:
        added = prefix_len * with_prefix + sum(_own_tokens(sample, prefix_len) for _, sample in more)
        work = _unit_cost(more, prefix_len, with_prefix)
        return tokens + added <= max_tokens and cost + work <= max_cost

    for unit in units:
        prefix_len = _shared_prefix_len(unit)
        together = whole and fits(unit, prefix_len, True, 0, 0.0)
        begun = False
        for item in unit:
            needed = unit if together and not begun else [item]
            if not bins or not fits(needed, prefix_len, not begun, tokens, cost):
                bins.append([])
                tokens, cost, begun = 0, 0.0, False
            if not begun:
                bins[-1].append([])
                tokens, cost = tokens + prefix_len, cost + _unit_cost([], prefix_len, True)
                begun = True
            bins[-1][-1].append(item)
            tokens += _own_tokens(item[1], prefix_len)
            cost += _unit_cost([item], prefix_len, False)
    return bins


def _duration(bins: Sequence[_Bin], processes: int) -> float:
    """Of all rounds; in each of them everybody waits for the slowest."""
    costs = [_cost(bin_) for bin_ in bins]
    return sum(max(costs[start : start + processes]) for start in range(0, len(costs), processes))


def _cost(bin_: _Bin) -> float:
    return sum(_unit_cost(members, _shared_prefix_len(members), True) for members in bin_)


def _unit_cost(members: Sequence[_Numbered], prefix_len: int, with_prefix: bool) -> float:
    """Work in tokens, of which each costs more the more keys it sees."""
    cost = prefix_len * (1 + prefix_len / 2 / KEYS_THAT_DOUBLE) if with_prefix else 0.0
    for _, sample in members:
        own = _own_tokens(sample, prefix_len)
        cost += own * (1 + (prefix_len + own / 2) / KEYS_THAT_DOUBLE)
    return cost


def _shared_prefix_len(members: Sequence[_Numbered]) -> int:
    return min(sample.prefix_len for _, sample in members)


def _own_tokens(sample: TurnSample, prefix_len: int) -> int:
    # The last response token is predicted but predicts nothing, so it is never an input.
    return len(sample.prompt_ids) - prefix_len + max(0, len(sample.response_ids) - 1)


def _assemble(groups: _Bin) -> PackedBatch:
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []
    row_targets: list[int] = []
    row_advantages: list[float] = []
    row_logprobs: list[float] = []
    row_sequences: list[int] = []
    logical_tokens = 0

    for members in groups:
        prefix_len = _shared_prefix_len(members)
        prefix = members[0][1].prompt_ids[:prefix_len]
        prefix_start = len(input_ids)
        prefix_end = prefix_start + prefix_len
        if prefix:
            input_ids.extend(prefix)
            position_ids.extend(range(prefix_len))
            segments.append(Segment(prefix_start, prefix_end))
        for number, sample in members:
            assert sample.prompt_ids[:prefix_len] == prefix, "samples of one prefix_key must share it token for token"
            assert prefix_len < len(sample.prompt_ids), (
                "the row that predicts the first response token is the sample's own"
            )
            own = sample.prompt_ids[prefix_len:] + sample.response_ids[:-1]
            start = len(input_ids)
            input_ids.extend(own)
            position_ids.extend(range(prefix_len, prefix_len + len(own)))
            segments.append(Segment(start, len(input_ids), prefix_start, prefix_end))
            rows.extend(range(len(input_ids) - len(sample.response_ids), len(input_ids)))
            row_targets.extend(sample.response_ids)
            row_advantages.extend([sample.advantage] * len(sample.response_ids))
            row_logprobs.extend(sample.sampling_logprobs)
            row_sequences.extend([number] * len(sample.response_ids))
            logical_tokens += prefix_len + len(own)

    def scatter(values: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=dtype).index_put_(
            (torch.tensor(rows, dtype=torch.int64),), torch.tensor(values, dtype=dtype)
        )

    return PackedBatch(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.tensor(position_ids),
        segments=tuple(segments),
        targets=scatter(row_targets, torch.int64),
        mask=scatter([True] * len(rows), torch.bool),
        advantages=scatter(row_advantages, torch.float32),
        sampling_logprobs=scatter(row_logprobs, torch.float32),
        sequence_ids=scatter(row_sequences, torch.int64),
        logical_tokens=logical_tokens,
    )
