"""The meaning of the GRPO loss: the reference against a plain NumPy reading of the formula; metrics and errors.

N rows, D hidden size, V vocabulary, as in `negotiator.loss`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from loss_cases import LOSS_TYPES, VARIANTS, gradients, options, problem

from negotiator.loss import default_denominator, grpo_loss, token_logprobs

# --- the reference against the formula, written again in NumPy, a row at a time ---------------------------------------


def oracle(args: dict[str, Any], frozen: np.ndarray) -> float:
    """The loss as the contract words it. `frozen` [N] stands for log-probs where no gradient flows."""
    a = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in args.items()}
    loss_type, temperature = a["loss_type"], a.get("temperature", 1.0)
    low, high = 1 - a.get("clip_low", 0.2), 1 + a.get("clip_high", 0.2)
    importance, cap = a.get("importance", "none"), a.get("importance_cap", 2.0)

    sequences: dict[int, list[tuple[float, float, float, float]]] = {}  # (advantage, logp - old, w, penalty) a row
    policy_terms: dict[int, list[float]] = {}
    for t in np.flatnonzero(a["mask"]):
        logits = a["lm_head_weight"] @ a["hidden"][t] / temperature
        logs = logits - np.logaddexp.reduce(logits)
        logp, entropy = logs[a["targets"][t]], -np.sum(np.exp(logs) * logs)
        old = a["old_logprobs"][t] if "old_logprobs" in a else frozen[t]
        weight = math.exp((a["old_logprobs"][t] if "old_logprobs" in a else frozen[t]) - a["sampling_logprobs"][t])
        if importance == "none":
            weight = 1.0
        elif importance == "truncate":
            weight = min(weight, cap)
        elif not 1 / cap <= weight <= cap:
            weight = 0.0
        gap = a["ref_logprobs"][t] - logp
        penalty = a.get("beta", 0.0) * (math.exp(gap) - gap - 1) - a.get("entropy_coef", 0.0) * entropy
        advantage = a["advantages"][t]
        ratio = math.exp(logp - old)
        if loss_type == "cispo":
            policy = -min(math.exp(frozen[t] - old), high) * advantage * logp
        else:
            policy = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
        key = int(a["sequence_ids"][t])
        sequences.setdefault(key, []).append((advantage, logp - old, weight, penalty))
        policy_terms.setdefault(key, []).append(policy * weight + penalty)

    lengths = [len(rows) for rows in sequences.values()]
    if loss_type == "gspo":
        total = 0.0
        for rows in sequences.values():
            advantage, gap, weight, penalty = np.mean(rows, axis=0)
            ratio = math.exp(gap)
            total += -min(ratio * advantage, min(max(ratio, low), high) * advantage) * weight + penalty
        default = len(lengths)
    elif loss_type == "grpo":
        total, default = sum(np.mean(terms) for terms in policy_terms.values()), len(lengths)
    else:
        total = sum(sum(terms) for terms in policy_terms.values())
        default = len(lengths) * max(lengths) if loss_type == "dr_grpo" else sum(lengths)
    return float(total / a.get("denominator", default))


@pytest.mark.parametrize("off_policy", [True, False], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reference_is_the_formula_and_its_derivative(loss_type: str, variant: str, off_policy: bool) -> None:
    args = problem(n=9, d=3, v=5, seed=3)
    loss_args = {**options(args, variant, off_policy), "loss_type": loss_type}
    result, d_hidden, d_weight = gradients({**loss_args, "backend": "reference"})
    frozen = result.logprobs.numpy()
    assert result.loss.item() == pytest.approx(oracle(loss_args, frozen), rel=1e-12)

    step = 1e-6
    for name, gradient in (("hidden", d_hidden), ("lm_head_weight", d_weight)):
        measured = torch.zeros_like(gradient)
        for i in range(gradient.numel()):
            sides = []
            for sign in (1, -1):
                moved = args[name].clone()
                moved.view(-1)[i] += sign * step
                sides.append(oracle({**loss_args, name: moved}, frozen))
            measured.view(-1)[i] = (sides[0] - sides[1]) / (2 * step)
        assert measured.norm() > 1e-3
        torch.testing.assert_close(gradient, measured, rtol=1e-6, atol=1e-8)


# --- one step in several calls ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_with_the_step_denominator_equal_one_call(loss_type: str) -> None:
    args = problem(n=60)
    settings = {"loss_type": loss_type, "beta": 0.1, "entropy_coef": 0.05, "importance": "truncate"}
    whole, d_hidden, d_weight = gradients({**args, **settings})
    counts = [int(((args["sequence_ids"] == i) & args["mask"]).sum()) for i in (1000, 2000, 3000, 4000)]
    denominator = default_denominator(loss_type, counts)

    loss, d_hidden_sum, d_weight_sum = 0.0, torch.zeros_like(d_hidden), torch.zeros_like(d_weight)
    for part in ((1000, 3000), (2000,)):
        rows = torch.isin(args["sequence_ids"], torch.tensor(part))
        micro = {k: v if k == "lm_head_weight" else v[rows] for k, v in args.items()}
        result, d_hidden_part, d_weight_part = gradients({**micro, **settings, "denominator": denominator})
        loss += result.loss.item()
        d_hidden_sum[rows] += d_hidden_part
        d_weight_sum += d_weight_part
    assert loss == pytest.approx(whole.loss.item(), rel=1e-12)
    torch.testing.assert_close(d_hidden_sum, d_hidden)
    torch.testing.assert_close(d_weight_sum, d_weight)


def test_default_denominator() -> None:
    counts = [3, 0, 5, 2]
    expected = {"dapo": 10, "cispo": 10, "grpo": 3, "gspo": 3, "dr_grpo": 15}
    assert {loss_type: default_denominator(loss_type, counts) for loss_type in LOSS_TYPES} == expected
    assert {default_denominator(loss_type, [0, 0]) for loss_type in LOSS_TYPES} == {1}


# --- log-probs, metrics, errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_token_logprobs_are_those_of_the_loss() -> None:
    args = problem()
    result = grpo_loss(**args, temperature=0.7)
    logprobs, entropy = token_logprobs(*(args[k] for k in ("hidden", "lm_head_weight", "targets", "mask")), 0.7)
    assert torch.equal(logprobs[args["mask"]], result.logprobs[args["mask"]])
    assert torch.equal(entropy[args["mask"]], result.entropy[args["mask"]])
    assert torch.equal(logprobs.isnan(), ~args["mask"])
    assert not logprobs.requires_grad


def test_metrics() -> None:
    args = problem(n=6)
    args["mask"] = torch.tensor([True, True, True, True, False, True])
    now, _ = token_logprobs(*(args[k] for k in ("hidden", "lm_head_weight", "targets", "mask")))
    ratios = torch.tensor([0.5, 0.5, 1.5, 1.5, 99.0, 1.0], dtype=torch.float64)
    weights = torch.tensor([1.0, 1.0, 4.0, 0.25, 99.0, 1.0], dtype=torch.float64)
    args["old_logprobs"] = now - ratios.log()
    args["sampling_logprobs"] = args["old_logprobs"] - weights.log()
    args["advantages"] = torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0, 1.0])
    metrics = grpo_loss(**args, importance="truncate").metrics
    assert metrics.trained_tokens == 5
    assert metrics.ratio_mean.item() == pytest.approx(1.0)
    assert metrics.ratio_max.item() == pytest.approx(1.5)
    assert metrics.clip_fraction_low.item() == pytest.approx(0.4)
    assert metrics.clip_fraction_high.item() == pytest.approx(0.2)
    assert metrics.approx_kl.item() == pytest.approx(sum(r - 1 - math.log(r) for r in (0.5, 0.5, 1.5, 1.5, 1.0)) / 5)
    assert metrics.importance_mean.item() == pytest.approx((1 + 1 + 2 + 0.25 + 1) / 5)
    assert grpo_loss(**args, importance="mask").metrics.importance_mean.item() == pytest.approx(3 / 5)
    cispo = grpo_loss(**args, loss_type="cispo").metrics
    assert (cispo.clip_fraction_low.item(), cispo.clip_fraction_high.item()) == (0, pytest.approx(0.4))
    # gspo clips the geometric mean of a sequence's ratios; each of its rows counts.
    args["sequence_ids"] = torch.tensor([5, 5, 9, 9, 9, 9])
    gspo = grpo_loss(**args, loss_type="gspo").metrics
    assert gspo.ratio_mean.item() == pytest.approx((2 * 0.5 + 3 * 1.5 ** (2 / 3)) / 5)
    assert gspo.ratio_max.item() == pytest.approx(1.5 ** (2 / 3))
    assert gspo.clip_fraction_low.item() == pytest.approx(0.4)


BAD_ARGUMENTS = {
    "hidden": [torch.zeros(37), torch.zeros(37, 16, dtype=torch.int64)],
    "lm_head_weight": [torch.zeros(101, 15, dtype=torch.float64), torch.zeros(101, 16, dtype=torch.float32)],
    "targets": [torch.zeros(36, dtype=torch.int64), torch.zeros(37, dtype=torch.int32), torch.full((37,), 101)],
    "advantages": [torch.zeros(37, 1), torch.zeros(37, dtype=torch.int64)],
    "mask": [torch.ones(37), torch.ones(36, dtype=torch.bool)],
    "sampling_logprobs": [torch.zeros(36)],
    "old_logprobs": [torch.zeros(36)],
    "ref_logprobs": [torch.zeros(36)],
    "sequence_ids": [torch.zeros(37), torch.zeros(36, dtype=torch.int64)],
    "temperature": [0.0, math.nan],
    "loss_type": ["ppo"],
    "clip_low": [-0.1],
    "clip_high": [math.nan],
    "beta": [-1.0],
    "entropy_coef": [math.inf],
    "importance": ["clip"],
    "importance_cap": [0.5],
    "denominator": [-1.0, math.nan],
    "backend": ["cuda", "triton"],
}


@pytest.mark.parametrize(("name", "value"), [(k, v) for k, vs in BAD_ARGUMENTS.items() for v in vs], ids=str)
def test_a_bad_argument_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        grpo_loss(**{**problem(), name: value})


def test_what_is_missing_is_named() -> None:
    args = problem()
    without_reference = {k: v for k, v in args.items() if k != "ref_logprobs"}
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(**without_reference, beta=0.1)
    without_sequences = {k: v for k, v in args.items() if k != "sequence_ids"}
    for loss_type in ("grpo", "dr_grpo", "gspo"):
        with pytest.raises(ValueError, match="sequence_ids"):
            grpo_loss(**without_sequences, loss_type=loss_type)
    for loss_type, denominator in itertools.product(("dapo", "cispo"), (None, 7.0)):
        assert grpo_loss(**without_sequences, loss_type=loss_type, denominator=denominator).loss.isfinite()
