"""The records that flow through a training step, and who fills each field.

    Scenario -> Dialogue (of Utterances and a Completion) -> DialogueGroup -> TurnSample -> PackedBatch

Nothing here computes anything beyond reading its own fields; every function that fills a field is named beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

Agent = Literal["agent1", "agent2"]
DialogueState = Literal["scored", "no_agreement", "failed"]


@dataclass(frozen=True, slots=True)
class Persona:
    """One party: a name and a description in the second person."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class PersonaPair:
    """Two personas who pull in opposite directions."""

    id: str
    tension: str
    a: Persona
    b: Persona


@dataclass(frozen=True, slots=True)
class Dilemma:
    """A situation that ends with a question. `category` is its severity, `domain` its field of life."""

    id: str
    category: str
    domain: str
    text: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """A dilemma and who argues about it; drawn by `data.draw_scenarios`. `index` is its place within the step."""

    index: int
    dilemma: Dilemma
    agent1: Persona
    agent2: Persona
    pair_id: str

    def persona(self, agent: Agent) -> Persona:
        return self.agent1 if agent == "agent1" else self.agent2


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one text is sampled. `temperature` 0 means greedy; `seed` alone fixes the stream of random numbers."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """What an engine answers.

    `ids` include the stop token when one was sampled. `logprobs[i]` is that of `ids[i]` under the temperature-scaled
    softmax over the whole vocabulary, before any top-p truncation (greedy: temperature 1), so that the trainer can
    recompute it. `cached_tokens` counts the prompt tokens whose keys and values were reused, not computed.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    cached_tokens: int
    weight_version: int


@dataclass(frozen=True, slots=True)
class Utterance:
    """One turn, with the exact ids it was sampled under; filled by `dialogue.negotiate`."""

    agent: Agent
    text: str
    prompt_ids: tuple[int, ...]
    prefix_len: int  # leading prompt ids (persona, rules, dilemma) that all turns of this agent share in its group
    generation: Generation


@dataclass(frozen=True, slots=True)
class AgreementVerdict:
    """The agreement judge's word on one round. `probability` is P(agree); judges that say yes or no give 0 or 1."""

    agree: bool
    probability: float
    failure: str | None = None  # why the judge could not tell; then `agree` means nothing


@dataclass(frozen=True, slots=True)
class ScoreVerdict:
    """The reward judge's word on a completion: 0 (works against Collective Agency) to 5."""

    score: float
    failure: str | None = None  # why the judge could not score; then `score` means nothing


@dataclass(slots=True)
class Dialogue:
    """One negotiation. `state` and `score` are set when it ends, `advantage` by `advantages.assign`."""

    scenario: Scenario
    index: int  # place in its group
    utterances: list[Utterance] = field(default_factory=list)
    verdicts: list[AgreementVerdict] = field(default_factory=list)  # one a round
    completion: str | None = None
    score: ScoreVerdict | None = None
    state: DialogueState = "failed"
    failure: str | None = None  # set exactly when state is "failed"
    advantage: float = 0.0

    @property
    def rounds(self) -> int:
        return len(self.verdicts)

    @property
    def reward(self) -> float:
        """The training reward: the score, or 0 without agreement. A failed dialogue has none."""
        assert self.state != "failed", "a failed dialogue has no reward"
        return self.score.score if self.score is not None and self.state == "scored" else 0.0


@dataclass(slots=True)
class DialogueGroup:
    """The G dialogues of one scenario, compared with one another."""

    scenario: Scenario
    dialogues: list[Dialogue]

    @property
    def valid(self) -> list[Dialogue]:
        """Dialogues that ended; the failed ones take part in nothing."""
        return [d for d in self.dialogues if d.state != "failed"]


@dataclass(frozen=True, slots=True)
class TurnSample:
    """One utterance as training sees it: the sampled ids under the prompt they were sampled under.

    Samples with equal `prefix_key` share their first `prefix_len` prompt ids, token for token.
    """

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    sampling_logprobs: tuple[float, ...]
    advantage: float
    prefix_key: tuple[int, Agent]
    prefix_len: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Packed tokens [start, end): each sees those before it in the segment and all of [prefix_start, prefix_end).

    A prefix is a segment of its own with an empty prefix; the turn samples of its group name it as theirs.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch without padding; built by `packing.pack`. T = packed tokens.

    The row at t predicts `targets[t]`, the next token of its sample; rows with `mask` False predict nothing that is
    trained, and what the other fields hold there is meaningless.
    """

    input_ids: torch.Tensor  # [T] int64
    position_ids: torch.Tensor  # [T] int64, position within the unpacked sample
    segments: tuple[Segment, ...]
    targets: torch.Tensor  # [T] int64
    mask: torch.Tensor  # [T] bool
    advantages: torch.Tensor  # [T] fp32
    sampling_logprobs: torch.Tensor  # [T] fp32
    sequence_ids: torch.Tensor  # [T] int64, number of the turn sample within the step
    logical_tokens: int  # what the same samples would take unpacked, each with its own copy of the prefix
