"""A masked GRPO problem of a given shape, and the fp64 truth to hold a provider's answer against.

The problem looks like a step of training: logits are peaked (their standard deviation is 2, and the target's is lifted
so that its probability is about a half), advantages are equal within a sequence, and the old policy is so near that no
row to speak of is clipped: nothing is measured but the work on trained rows, all of which have a gradient.

The truth comes from the same rounded inputs: log-probs of all trained rows, d_hidden of a sample of them, and d_weight
of a sample of the vocabulary, which needs the softmax of every trained row. So it sees the sums over the whole problem
at a third of its multiplications.

Shapes: N tokens, M of them trained, D hidden size, V vocabulary, B sequences of N / B tokens, R and W sampled rows of
hidden and weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CLIP = 0.2
SEQUENCE_TOKENS = 1024
LOGIT_SPREAD = 2.0
OLD_POLICY_GAP = 0.05  # standard deviation of log p - log p_old: the clip is 3.6 of them away
SAMPLED_ROWS = 64
SAMPLED_WORDS = 1024
TRUTH_BYTES = 128 << 20  # fp64 logits held at once


class Shape(NamedTuple):
    tokens: int
    hidden: int
    vocabulary: int
    fraction: float  # of the tokens that are trained

    @property
    def trained(self) -> int:
        return max(1, round(self.fraction * self.tokens))

    @property
    def sequences(self) -> int:
        return self.tokens // math.gcd(self.tokens, SEQUENCE_TOKENS)

    @property
    def flop(self) -> int:
        """Of the loss and both gradients over trained rows when no logit is computed twice: 6DV a row."""
        return 6 * self.trained * self.hidden * self.vocabulary

    def __str__(self) -> str:
        return f"{self.tokens}x{self.hidden}x{self.vocabulary}@{self.fraction:g}"


def parse_shape(text: str) -> Shape:
    """`4096x576x49152@0.45`: tokens, hidden size, vocabulary, trained fraction."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)@(\d*\.?\d+)", text)
    if match is None:
        raise ValueError(f"a shape is TOKENSxHIDDENxVOCABULARY@FRACTION, like 4096x576x49152@0.45, not {text!r}")
    shape = Shape(int(match[1]), int(match[2]), int(match[3]), float(match[4]))
    if min(shape[:3]) < 1 or not 0 < shape.fraction <= 1:
        raise ValueError(f"the sizes of a shape must be at least 1 and its fraction in (0, 1], not {text!r}")
    return shape


class Gradients(NamedTuple):
    hidden: Tensor  # [R, D] fp64
    weight: Tensor  # [W, D] fp64


@dataclass(frozen=True, slots=True)
class Truth:
    logprobs: Tensor  # [M] fp64
    rows: Tensor  # [R] places in [M]
    words: Tensor  # [W] places in [V]
    grpo: Gradients
    cross_entropy: Gradients  # of the mean over trained rows


@dataclass(frozen=True, slots=True)
class Problem:
    shape: Shape
    hidden: Tensor  # [N, D] leaf
    weight: Tensor  # [V, D] leaf
    targets: Tensor  # [N]
    advantages: Tensor  # [N] fp32
    mask: Tensor  # [N] bool
    old_logprobs: Tensor  # [N] fp32, 0 where masked
    trained: Tensor  # [M] where mask is True
    trained_hidden: Tensor  # [M, D] leaf, for the cross-entropy providers
    truth: Truth


class Answer(NamedTuple):
    """What every provider returns."""

    loss: Tensor  # scalar
    logprobs: Tensor | None  # [M], None where the provider keeps them to itself
    d_hidden: Tensor  # [N, D]; [M, D] from cross-entropy providers
    d_weight: Tensor  # [V, D]


class Errors(NamedTuple):
    logprob_max_abs: float | None
    grad_rel: float  # norm of the difference over norm of the truth, the larger of d_hidden and d_weight


def dapo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The masked mean as people write it; every argument [N] or every one [M]."""
    ratio = (logprobs - old).exp()
    terms = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    return -(terms * mask).sum() / mask.sum()


def lifted_hidden(noise: Tensor, weight: Tensor, targets: Tensor, spread: float) -> Tensor:
    """Hidden states [N, D] from standard normal noise. Logits are N(0, spread^2), and the target's is lifted to about
    their log-sum-exp: log V + spread^2 / 2, or the largest of them where it alone counts. Rows of `weight` have norm 1.
    """
    logs = math.log(len(weight))
    lift = logs + spread**2 / 2 if spread**2 < 2 * logs else spread * math.sqrt(2 * logs)
    return spread * noise + lift * weight[targets].float()


def make_problem(shape: Shape, dtype: torch.dtype, device: torch.device) -> Problem:
    (problem,) = make_problems(shape, [shape.tokens], dtype, device)
    return problem


def make_problems(shape: Shape, tokens: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Problem]:
    """One of each number of tokens; they share the weight."""
    generator = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(shape.vocabulary, shape.hidden, generator=generator, device=device) / shape.hidden**0.5).to(
        dtype
    )
    exact = weight.double()
    return [_problem(shape._replace(tokens=n), weight.requires_grad_(), exact, generator) for n in tokens]


def _problem(shape: Shape, weight: Tensor, exact_weight: Tensor, generator: torch.Generator) -> Problem:
    n, d, v, _ = shape
    device = weight.device

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    targets = torch.randint(v, (n,), generator=generator, device=device)
    hidden = lifted_hidden(normal(n, d), weight.detach(), targets, LOGIT_SPREAD).to(weight.dtype)
    trained = torch.randperm(n, generator=generator, device=device)[: shape.trained].sort().values
    mask = torch.zeros(n, dtype=torch.bool, device=device).index_fill(0, trained, True)
    advantages = normal(shape.sequences).repeat_interleave(n // shape.sequences)
    gap = OLD_POLICY_GAP * normal(shape.trained)
    any_words = torch.randperm(v, generator=generator, device=device)[: SAMPLED_WORDS // 2]
    words = torch.cat([targets[trained[: SAMPLED_WORDS // 2]], any_words]).unique()
    rows = torch.randperm(shape.trained, generator=generator, device=device)[:SAMPLED_ROWS]

    truth, old = _truth(hidden[trained], exact_weight, targets[trained], advantages[trained], gap, rows, words)
    return Problem(
        shape=shape,
        hidden=hidden.requires_grad_(),
        weight=weight,
        targets=targets,
        advantages=advantages,
        mask=mask,
        old_logprobs=torch.zeros(n, device=device).index_copy(0, trained, old),
        trained=trained,
        trained_hidden=hidden.detach()[trained].requires_grad_(),
        truth=truth,
    )


def _truth(
    hidden: Tensor, w: Tensor, targets: Tensor, advantages: Tensor, gap: Tensor, rows: Tensor, words: Tensor
) -> tuple[Truth, Tensor]:
    """The truth, and the log-probs [M] of an old policy at the distance `gap` [M]. Everything is of trained rows only;
    `w` [V, D] is the weight in fp64.
    """
    total = len(hidden)
    logprobs, old, slopes = w.new_empty(total), gap.new_empty(total), w.new_empty(total)  # slopes: d loss / d log-prob
    d_weight, d_weight_ce = w.new_zeros(len(words), w.shape[1]), w.new_zeros(len(words), w.shape[1])
    ones = torch.ones_like(gap)
    for at in torch.arange(total, device=w.device).split(max(1, TRUTH_BYTES // (8 * len(w)))):
        x, y = hidden[at].double(), targets[at]
        logits = x @ w.T
        log_sums = logits.logsumexp(dim=1)
        logprobs[at] = logits.gather(1, y[:, None]).squeeze(1) - log_sums
        old[at] = (logprobs[at] - gap[at]).float()
        leaf = logprobs[at].requires_grad_()
        (slope,) = torch.autograd.grad(dapo_loss(leaf, old[at].double(), advantages[at].double(), ones[at]), leaf)
        slopes[at] = slope * len(at) / total
        d_logits = (y[:, None] == words).double() - (logits[:, words] - log_sums[:, None]).exp()
        d_weight += (slopes[at, None] * d_logits).T @ x
        d_weight_ce += d_logits.T @ x / -total
    y = targets[rows]
    d_hidden = w[y] - torch.softmax(hidden[rows].double() @ w.T, dim=1) @ w  # of the log-prob
    truth = Truth(
        logprobs=logprobs,
        rows=rows,
        words=words,
        grpo=Gradients(d_hidden * slopes[rows, None], d_weight),
        cross_entropy=Gradients(d_hidden / -total, d_weight_ce),
    )
    return truth, old


def errors(answer: Answer, problem: Problem, cross_entropy: bool) -> Errors:
    truth = problem.truth
    gradients = truth.cross_entropy if cross_entropy else truth.grpo
    rows = truth.rows if len(answer.d_hidden) == problem.shape.trained else problem.trained[truth.rows]
    pairs = ((answer.d_hidden[rows], gradients.hidden), (answer.d_weight[truth.words], gradients.weight))
    logprob_error = None
    if answer.logprobs is not None:
        logprob_error = (answer.logprobs.double() - truth.logprobs).abs().max().item()
    return Errors(logprob_error, max(((found - true).norm() / true.norm()).item() for found, true in pairs))
