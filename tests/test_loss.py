"""The GRPO loss: the reference against a plain NumPy reading of the formula, the chunked backend against the reference.

N rows, D hidden size, V vocabulary, as in `negotiator.loss`.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from negotiator.loss import GRPOLoss, default_denominator, grpo_loss, token_logprobs
from negotiator_kernels import chunked

LOSS_TYPES = ("dapo", "grpo", "dr_grpo", "cispo", "gspo")
# What a run may switch on besides the loss type; every off-policy log-ratio below crosses the clip on both sides.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "truncate": {"importance": "truncate", "importance_cap": 1.2},
    "mask": {"importance": "mask", "importance_cap": 1.3},
    "beta": {"beta": 0.3},
    "entropy": {"entropy_coef": 0.2, "temperature": 1.6},
    "clip": {"clip_low": 0.1, "clip_high": 0.4},
    "denominator": {"denominator": 17.0},
    "all": {
        "importance": "truncate", "importance_cap": 1.2, "beta": 0.3, "entropy_coef": 0.2, "temperature": 0.7,
        "denominator": 9.5,
    },
}  # fmt: skip


def problem(n: int = 37, d: int = 16, v: int = 101, seed: int = 0, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Arguments in fp64. Sequences are interleaved and of unequal length; the old policy is near, the engine nearer."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = normal(n, d), normal(v, d) * scale / d**0.5
    logprobs, _ = token_logprobs(
        hidden, weight, targets := torch.randint(0, v, (n,), generator=g), torch.ones(n, dtype=torch.bool), 0.7
    )
    sequence_ids = torch.randint(0, 4, (n,), generator=g).clamp(min=1) * 1000
    return {
        "hidden": hidden,
        "lm_head_weight": weight,
        "targets": targets,
        "advantages": normal(4)[sequence_ids // 1000],
        "mask": torch.rand(n, generator=g) < 0.6,
        "sampling_logprobs": logprobs + 0.3 * normal(n),
        "old_logprobs": logprobs + 0.4 * normal(n),
        "ref_logprobs": logprobs + 0.5 * normal(n),
        "sequence_ids": sequence_ids,
    }


def options(args: dict[str, torch.Tensor], variant: str, off_policy: bool) -> dict[str, Any]:
    drop = () if off_policy else ("old_logprobs",)
    return {**{k: v for k, v in args.items() if k not in drop}, **VARIANTS[variant]}


def gradients(loss_args: dict[str, Any]) -> tuple[GRPOLoss, torch.Tensor, torch.Tensor]:
    hidden = loss_args["hidden"].detach().requires_grad_()
    weight = loss_args["lm_head_weight"].detach().requires_grad_()
    result = grpo_loss(**{**loss_args, "hidden": hidden, "lm_head_weight": weight})
    return result, *torch.autograd.grad(result.loss, (hidden, weight))


def cast(args: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if k in ("hidden", "lm_head_weight") else v for k, v in args.items()}


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5 rows and blocks of 2 at V = 101 in fp64, so that every test crosses their borders."""
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 5 * 101 * 8)
    monkeypatch.setitem(chunked.BLOCK_BYTES, "cpu", 2 * 101 * 8)


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


# --- the chunked backend against the reference ------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("off_policy", [True, False], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_chunked_equals_reference_in_fp64(loss_type: str, variant: str, off_policy: bool) -> None:
    loss_args = {**options(problem(), variant, off_policy), "loss_type": loss_type}
    expected, expected_d_hidden, expected_d_weight = gradients({**loss_args, "backend": "reference"})
    result, d_hidden, d_weight = gradients({**loss_args, "backend": "torch"})
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(result.loss, expected.loss, **close)
    torch.testing.assert_close(result.logprobs, expected.logprobs, equal_nan=True, **close)
    torch.testing.assert_close(result.entropy, expected.entropy, equal_nan=True, **close)
    torch.testing.assert_close(d_hidden, expected_d_hidden, **close)
    torch.testing.assert_close(d_weight, expected_d_weight, **close)
    assert d_hidden.norm() > 1e-3


def plain_torch(args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What anybody would write: logits in the model's dtype, the off-policy dapo loss in fp32. -> loss, logp, grads"""
    hidden, weight = (args[k].detach().requires_grad_() for k in ("hidden", "lm_head_weight"))
    keep = args["mask"]
    logits = torch.nn.functional.linear(hidden[keep], weight).float() / args["temperature"]
    logs = torch.log_softmax(logits, dim=-1)
    logp = logs.gather(1, args["targets"][keep, None]).squeeze(1)
    ratio, advantages = (logp - args["old_logprobs"][keep].float()).exp(), args["advantages"][keep].float()
    policy = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    entropy = -(logs.exp() * logs).sum(dim=-1)
    loss = -(policy + args["entropy_coef"] * entropy).sum() / keep.sum()
    return loss, logp.detach(), *torch.autograd.grad(loss, (hidden, weight))


@pytest.mark.parametrize("v", [1003, 2048])
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_is_no_worse_than_plain_torch_in_the_same_dtype(
    dtype: torch.dtype, scale: float, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 50 * v * 4)
    args: dict[str, Any] = cast(problem(n=300, d=64, v=v, scale=scale), dtype)
    args |= {"temperature": 0.8, "entropy_coef": 0.01}
    # An old policy near this very model: log-ratios within and beyond the clip, not all beyond it.
    now, _ = token_logprobs(*(args[k] for k in ("hidden", "lm_head_weight", "targets", "mask")), temperature=0.8)
    args["old_logprobs"] = now.double() + 0.2 * torch.randn(300, generator=torch.Generator().manual_seed(1)).double()
    exact, *exact_gradients = gradients(cast({**args, "backend": "reference"}, torch.float64))

    result, *ours = gradients({**args, "backend": "torch"})
    plain_loss, plain_logp, *plain = plain_torch(args)
    keep = args["mask"]
    assert result.loss.dtype == result.logprobs.dtype == torch.float32
    assert all(g.dtype == dtype for g in ours)
    assert relative(result.logprobs[keep], exact.logprobs[keep]) <= 2e-6  # bf16 too: its logits are never rounded
    assert relative(result.logprobs[keep], exact.logprobs[keep]) <= 2 * relative(plain_logp, exact.logprobs[keep])
    assert relative(result.entropy[keep], exact.entropy[keep]) <= 2e-6
    assert abs(result.loss.item() - exact.loss.item()) <= 2 * abs(plain_loss.item() - exact.loss.item()) + 1e-6
    for mine, theirs, truth in zip(ours, plain, exact_gradients, strict=True):
        assert relative(mine, truth) <= 2 * relative(theirs, truth)
        assert relative(mine, truth) <= (2.5e-3 if dtype == torch.bfloat16 else 1e-5)  # bf16: one rounding, at the end
        assert mine.double().norm() == pytest.approx(truth.norm().item(), rel=1e-3)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_zero_gradient_and_clipped_rows_and_masked_rows_take_no_matmul(loss_type: str) -> None:
    args = problem(n=40, d=8, v=101)
    args["mask"] = torch.arange(40) < 30
    args["advantages"] = torch.where(args["sequence_ids"] == 1000, 0.0, 1.0)
    silent = int(((args["sequence_ids"] == 1000) & args["mask"]).sum())
    del args["old_logprobs"]
    args["hidden"].requires_grad_()
    args["lm_head_weight"].requires_grad_()
    with FlopCounterMode(display=False) as flops:
        result = grpo_loss(**args, loss_type=loss_type)
        result.loss.backward()
    assert 0 < silent < 30
    assert flops.get_total_flops() == 2 * 8 * 101 * (30 + 2 * (30 - silent))
    assert result.metrics.skipped_rows == silent
    assert result.metrics.trained_tokens == 30
    assert result.logprobs[args["mask"]].isfinite().all()

    # An entropy term gives every row a gradient; so does a reference policy.
    assert grpo_loss(**args, loss_type=loss_type, entropy_coef=0.1).metrics.skipped_rows == 0
    assert grpo_loss(**args, loss_type=loss_type, beta=0.1).metrics.skipped_rows == 0
    # Positive advantage and a ratio far above the clip: nothing flows, except through cispo's log-prob.
    args["old_logprobs"] = result.logprobs - 1
    assert grpo_loss(**args, loss_type=loss_type).metrics.skipped_rows == (silent if loss_type == "cispo" else 30)


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, False), (False, True), (False, False)])
def test_gradients_nobody_asked_for_are_not_computed(hidden_grad: bool, weight_grad: bool) -> None:
    args = problem(n=40, d=8, v=101)
    _, *expected = gradients(args)
    args["hidden"].requires_grad_(hidden_grad)
    args["lm_head_weight"].requires_grad_(weight_grad)
    with FlopCounterMode(display=False) as flops:
        result = grpo_loss(**args)
        if hidden_grad or weight_grad:
            result.loss.backward()
    skipped = result.metrics.skipped_rows if hidden_grad or weight_grad else 0
    trained = int(args["mask"].sum())
    assert flops.get_total_flops() == 2 * 8 * 101 * (trained + (trained - skipped) * (hidden_grad + weight_grad))
    assert result.loss.requires_grad == (hidden_grad or weight_grad)
    for tensor, gradient in zip((args["hidden"], args["lm_head_weight"]), expected, strict=True):
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradient)


def test_no_tensor_grows_with_rows_times_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 16 * 1003 * 4)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    args = cast(problem(n=500, d=8, v=1003), torch.float32)
    for loss_type in LOSS_TYPES:
        with Watch():
            gradients({**args, "loss_type": loss_type, "entropy_coef": 0.1})
    assert largest == 16 * 1003


# --- awkward inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize(
    ("scale", "shift"), [(1000.0, 0.0), (1.0, -900.0), (1.0, 900.0)], ids=["peaked", "all negative", "all positive"]
)
def test_logits_near_a_thousand(backend: str, scale: float, shift: float) -> None:
    args = cast(problem(n=20, d=8, v=1003), torch.float32)
    args["hidden"] = args["hidden"] * scale
    args["hidden"][:, 0] = 1.0
    args["lm_head_weight"][:, 0] += shift
    args["targets"][:10] = (args["hidden"] @ args["lm_head_weight"].T)[:10].argmax(dim=1)  # sure and nearly hopeless
    del args["old_logprobs"]
    loss_args = {**args, "backend": backend, "entropy_coef": 0.1}
    result, *ours = gradients(loss_args)
    exact, *expected = gradients(cast({**loss_args, "backend": "reference"}, torch.float64))
    keep = args["mask"]
    logits = args["hidden"] @ args["lm_head_weight"].T
    assert logits.abs().amax() > 800
    assert shift == 0 or (logits.sign() == math.copysign(1, shift)).all()
    # An fp32 logit of size 1,000 is off by some 1e-4.
    torch.testing.assert_close(result.logprobs[keep].double(), exact.logprobs[keep], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(result.entropy[keep].double(), exact.entropy[keep], rtol=1e-3, atol=1e-3)
    for mine, truth in zip(ours, expected, strict=True):
        assert relative(mine, truth) < 1e-3


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_policy_that_ran_away_gives_no_nan(loss_type: str, sign: float) -> None:
    args = cast(problem(), torch.float32)
    args["old_logprobs"] = args["old_logprobs"] - sign * 200  # exp(200) overflows fp32
    for advantage in (0.0, 1.0, -1.0):
        args["advantages"] = torch.full((37,), advantage)
        result, d_hidden, d_weight = gradients({**args, "loss_type": loss_type})
        assert all(x.isfinite().all() for x in (result.loss, d_hidden, d_weight))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_rows_may_hold_anything_and_get_no_gradient(loss_type: str, backend: str) -> None:
    loss_args = {**problem(), "loss_type": loss_type, "beta": 0.1, "importance": "truncate", "backend": backend}
    expected, *expected_gradients = gradients(loss_args)
    poisoned = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in loss_args.items()}
    out = ~poisoned["mask"]
    for name in ("hidden", "advantages", "sampling_logprobs", "old_logprobs", "ref_logprobs"):
        poisoned[name][out] = math.nan
    poisoned["targets"][out] = -100
    poisoned["sequence_ids"][out] = 7
    result, *ours = gradients(poisoned)
    assert torch.equal(result.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected_gradients, strict=True))
    assert (ours[0][out] == 0).all()
    assert torch.equal(result.logprobs.isnan(), out)
    assert torch.equal(result.entropy.isnan(), out)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_empty_mask_is_a_connected_zero(loss_type: str, backend: str) -> None:
    args = problem()
    args["mask"][:] = False
    result, d_hidden, d_weight = gradients({**args, "loss_type": loss_type, "backend": backend, "beta": 0.1})
    assert result.loss.item() == 0
    assert d_hidden.shape == (37, 16)
    assert not d_hidden.any()
    assert not d_weight.any()
    assert result.metrics.trained_tokens == 0
    assert result.metrics.ratio_mean.isfinite()
    assert token_logprobs(args["hidden"], args["lm_head_weight"], args["targets"], args["mask"])[0].isnan().all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_row(loss_type: str) -> None:
    args = problem(n=1)
    args["mask"][:] = True
    loss_args = {**args, "loss_type": loss_type}
    expected, *expected_gradients = gradients({**loss_args, "backend": "reference"})
    result, *ours = gradients(loss_args)
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(ours, expected_gradients)


def test_strided_hidden_and_tied_weight() -> None:
    args = problem(n=30, d=8, v=50)
    ids = torch.randint(0, 50, (30,), generator=torch.Generator().manual_seed(0))
    answers = []
    for backend in ("reference", "torch"):
        embedding = args["lm_head_weight"].detach().clone().requires_grad_()
        wide = torch.stack([embedding[ids], args["hidden"]], dim=2)
        hidden = wide.tanh()[..., 0]  # rows and columns strided, made from the weight itself
        assert not hidden.is_contiguous()
        loss = grpo_loss(**{**args, "hidden": hidden, "lm_head_weight": embedding}, backend=backend).loss
        answers.append(torch.autograd.grad(loss, embedding)[0])
    torch.testing.assert_close(answers[1], answers[0])
    assert answers[0].norm() > 1e-3


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_and_incoming_gradient_change_nothing_but_scale(backend: Any) -> None:
    args = cast(problem(), torch.float32)
    expected, *expected_gradients = gradients({**args, "backend": backend})
    hidden, weight = args["hidden"].requires_grad_(), args["lm_head_weight"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = grpo_loss(**args, backend=backend)
        logprobs, entropy = token_logprobs(hidden, weight, args["targets"], args["mask"])
    for mine in (result.logprobs, logprobs):
        torch.testing.assert_close(mine, expected.logprobs, equal_nan=True)
    for mine in (result.entropy, entropy):
        torch.testing.assert_close(mine, expected.entropy, equal_nan=True)
    for factor in (-3.0, 0.5):
        ours = torch.autograd.grad(result.loss * factor, (hidden, weight), retain_graph=True)
        torch.testing.assert_close(ours, tuple(g * factor for g in expected_gradients))


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
