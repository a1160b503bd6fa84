"""The GRPO family of losses as a formula over log-probs, and the full-logits backend that every other one is held to.

`objective` is the formula. A backend turns hidden states into log-probs and entropies and carries the objective's
derivative back; this one lets autograd do it on all the logits, in the dtype of its input but at least fp32, so fp64
inputs make it an fp64 oracle. It holds [M, V] logits several times over: for tests and small inputs.

Every backend is a function `(hidden, weight, rows, spec) -> BackendResult` over trained rows only.

Shapes: M trained rows, D hidden size, V vocabulary, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LossType = Literal["dapo", "grpo", "dr_grpo", "cispo", "gspo"]
Importance = Literal["none", "truncate", "mask"]

MAX_LOG_RATIO = 80.0  # exp() of it is still finite in fp32


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the trained rows before the model speaks; nothing here carries a gradient."""

    targets: Tensor  # [M] int64
    advantages: Tensor  # [M]
    sampling_logprobs: Tensor | None  # [M]
    old_logprobs: Tensor | None  # [M], None when on-policy
    ref_logprobs: Tensor | None  # [M]
    sequence: Tensor | None  # [M] int64, number of the row's sequence in [0, S)
    sequence_rows: Tensor | None  # [S] rows of each sequence

    def slice(self, at: slice) -> Rows:
        """The rows at `at`. `sequence_rows` still counts the rows outside of it."""

        def cut(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[at]

        return Rows(
            targets=self.targets[at],
            advantages=self.advantages[at],
            sampling_logprobs=cut(self.sampling_logprobs),
            old_logprobs=cut(self.old_logprobs),
            ref_logprobs=cut(self.ref_logprobs),
            sequence=cut(self.sequence),
            sequence_rows=self.sequence_rows,
        )


@dataclass(frozen=True, slots=True)
class LossSpec:
    """The loss and its constants, validated by `negotiator.loss`."""

    loss_type: LossType
    temperature: float
    clip_low: float
    clip_high: float
    beta: float
    entropy_coef: float
    importance: Importance
    importance_cap: float
    denominator: float


class BackendResult(NamedTuple):
    loss: Tensor  # scalar
    logprobs: Tensor  # [M], no gradient
    entropy: Tensor  # [M], no gradient
    skipped_rows: int  # rows that needed no backward matmul


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp that stays finite: past the bound a row's gradient is 0, where inf * 0 in a clipped branch would be NaN."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def sequence_mean(values: Tensor, rows: Rows) -> Tensor:
    """Mean of [M] values over each sequence: [S]. All rows of a sequence have to be present."""
    assert rows.sequence is not None
    assert rows.sequence_rows is not None
    sums = values.new_zeros(rows.sequence_rows.shape[0]).index_add(0, rows.sequence, values)
    return sums / rows.sequence_rows


def log_ratio(logprobs: Tensor, rows: Rows) -> Tensor:
    """log rho [M] against the old policy; on-policy it is 0 but carries the gradient of `logprobs`."""
    return logprobs - (logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs)


def policy_ratio(logprobs: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
    """The ratio that the loss clips: rho_t [M], for gspo s_i [S]."""
    logs = log_ratio(logprobs, rows)
    return bounded_exp(sequence_mean(logs, rows) if spec.loss_type == "gspo" else logs)


def importance_weights(logprobs: Tensor, rows: Rows, spec: LossSpec) -> Tensor | None:
    """w_t [M], detached: how much likelier the trainer finds a token than the engine that sampled it."""
    if spec.importance == "none" or rows.sampling_logprobs is None:
        return None
    old = logprobs.detach() if rows.old_logprobs is None else rows.old_logprobs
    weights = (old - rows.sampling_logprobs).exp()
    cap = spec.importance_cap
    if spec.importance == "truncate":
        return weights.clamp(max=cap)
    return torch.where((weights >= 1 / cap) & (weights <= cap), weights, 0.0)


def objective(logprobs: Tensor, entropy: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
    """The loss (scalar) from log-probs [M] and entropies [M], differentiable in both.

    Except for gspo every row adds its own term, so the objective of a slice of rows is that slice's share of the loss.
    """
    ratio = policy_ratio(logprobs, rows, spec)
    weights = importance_weights(logprobs, rows, spec)
    advantages = rows.advantages
    if spec.loss_type == "gspo":  # one advantage a sequence: its rows carry equal ones
        advantages = sequence_mean(advantages, rows)
        weights = None if weights is None else sequence_mean(weights, rows)

    if spec.loss_type == "cispo":
        policy = -ratio.detach().clamp(max=1 + spec.clip_high) * advantages * logprobs
    else:
        clipped = ratio.clamp(1 - spec.clip_low, 1 + spec.clip_high)
        policy = -torch.minimum(ratio * advantages, clipped * advantages)
    terms = policy if weights is None else policy * weights  # [M], gspo [S]

    penalty = torch.zeros_like(logprobs)
    if spec.beta != 0:
        assert rows.ref_logprobs is not None
        ref_gap = rows.ref_logprobs - logprobs
        penalty = penalty + spec.beta * (bounded_exp(ref_gap) - ref_gap - 1)  # k3 estimate of KL(policy || reference)
    if spec.entropy_coef != 0:
        penalty = penalty - spec.entropy_coef * entropy
    terms = terms + (sequence_mean(penalty, rows) if spec.loss_type == "gspo" else penalty)

    if spec.loss_type == "grpo":
        assert rows.sequence is not None
        assert rows.sequence_rows is not None
        terms = terms / rows.sequence_rows[rows.sequence]
    return terms.sum() / spec.denominator


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [M] of `targets` and entropies [M] under softmax(hidden . weight / temperature), with autograd."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).T / temperature
    logs = torch.log_softmax(logits, dim=-1)
    return logs.gather(1, targets[:, None]).squeeze(1), -(logs.exp() * logs).sum(dim=-1)


def grpo_loss(hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec) -> BackendResult:
    """The reference backend."""
    logprobs, entropy = token_logprobs(hidden, weight, rows.targets, spec.temperature)
    loss = objective(logprobs, entropy, rows, spec)
    return BackendResult(loss, logprobs.detach(), entropy.detach(), skipped_rows=0)
