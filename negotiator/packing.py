"""Turn samples into micro-batches without padding, each group's prefix once.

A micro-batch is one row of T tokens: for every (scenario, agent) in it the shared prefix (persona, rules, dilemma),
then what each turn sample adds to it. Segments say what attends to what; nothing ever attends across samples.
"""

from __future__ import annotations

import itertools
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


def pack(samples: Sequence[TurnSample], max_tokens: int) -> list[PackedBatch]:
    """Packs samples into micro-batches of at most `max_tokens` tokens; a longer sample gets one of its own.

    Samples that share a prefix stay together where they fit, and `sequence_ids` are their places in `samples`.
    """
    numbered = sorted(enumerate(samples), key=lambda item: item[1].prefix_key)
    bins: list[list[list[_Numbered]]] = [[]]
    filled = 0
    for _, shared in itertools.groupby(numbered, key=lambda item: item[1].prefix_key):
        members = list(shared)
        prefix_len = _shared_prefix_len(members)
        whole = prefix_len + sum(_own_tokens(sample, prefix_len) for _, sample in members)
        open_group = False
        for item in members:
            own = _own_tokens(item[1], prefix_len)
            needed = own if open_group else (min(whole, max_tokens) if item is members[0] else prefix_len + own)
            if filled and filled + needed > max_tokens:
                bins.append([])
                filled, open_group = 0, False
            if not open_group:
                bins[-1].append([])
                filled, open_group = filled + prefix_len, True
            bins[-1][-1].append(item)
            filled += own
    return [_assemble(groups) for groups in bins if groups]


_Numbered = tuple[int, TurnSample]


def _shared_prefix_len(members: Sequence[_Numbered]) -> int:
    return min(sample.prefix_len for _, sample in members)


def _own_tokens(sample: TurnSample, prefix_len: int) -> int:
    # The last response token is predicted but predicts nothing, so it is never an input.
    return len(sample.prompt_ids) - prefix_len + len(sample.response_ids) - 1


def _assemble(groups: Sequence[Sequence[_Numbered]]) -> PackedBatch:
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
            (torch.tensor(rows),), torch.tensor(values, dtype=dtype)
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
