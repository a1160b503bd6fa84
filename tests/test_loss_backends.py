"""Every fused backend against the reference, in fp64 where it can and else by the error of plain torch.

N rows, D hidden size, V vocabulary, as in `negotiator.loss`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from corruption import CORRUPTIONS, corrupt
from loss_cases import LOSS_TYPES, VARIANTS, cast, gradients, options, problem, relative
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from negotiator.loss import grpo_loss, token_logprobs
from negotiator_kernels import fused, native

FUSED = ("torch", "native")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("off_policy", [True, False], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_torch_equals_the_reference_in_fp64(loss_type: str, variant: str, off_policy: bool) -> None:
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


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("off_policy", [True, False], ids=["off_policy", "on_policy"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_native_is_near_the_reference_in_fp64(loss_type: str, variant: str, off_policy: bool) -> None:
    args = cast(options(problem(), variant, off_policy), torch.float32)
    loss_args = {**args, "loss_type": loss_type, "backend": "native"}
    expected, *expected_gradients = gradients(cast({**loss_args, "backend": "reference"}, torch.float64))
    result, *ours = gradients(loss_args)
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    close = {"rtol": 2e-6, "atol": 2e-6, "equal_nan": True}
    torch.testing.assert_close(result.logprobs.double(), expected.logprobs, **close)
    torch.testing.assert_close(result.entropy.double(), expected.entropy, **close)
    for mine, truth in zip(ours, expected_gradients, strict=True):
        assert relative(mine, truth) < 1e-5


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
@pytest.mark.parametrize("backend", [*FUSED, "native in bf16"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.01])
def test_no_worse_than_plain_torch_in_the_same_dtype(
    entropy_coef: float, backend: str, dtype: torch.dtype, scale: float, v: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = 1e-5 if dtype == torch.float32 else 1.8e-3  # one rounding, at the end
    if backend == "native in bf16":  # the path of processors that multiply bf16
        backend = "native"
        monkeypatch.setattr(native, "CPU", native.CPU._replace(bf16_values=True))
        if dtype == torch.bfloat16 and scale > 1:
            # What else is rounded weighs most where one wrong token has all probability; an entropy bonus rounds twice.
            bound = 2.6e-3 if entropy_coef else 2.4e-3
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 50 * v * 4)
    args: dict[str, Any] = cast(problem(n=300, d=64, v=v, scale=scale), dtype)
    args |= {"temperature": 0.8, "entropy_coef": entropy_coef}
    # An old policy near this very model: log-ratios within and beyond the clip, not all beyond it.
    now, _ = token_logprobs(*(args[k] for k in ("hidden", "lm_head_weight", "targets", "mask")), temperature=0.8)
    args["old_logprobs"] = now.double() + 0.2 * torch.randn(300, generator=torch.Generator().manual_seed(1)).double()
    exact, *exact_gradients = gradients(cast({**args, "backend": "reference"}, torch.float64))

    result, *ours = gradients({**args, "backend": backend})
    plain_loss, plain_logp, *plain = plain_torch(args)
    keep = args["mask"]
    assert result.loss.dtype == result.logprobs.dtype == torch.float32
    assert all(g.dtype == dtype for g in ours)
    assert relative(result.logprobs[keep], exact.logprobs[keep]) <= 2e-6  # bf16 too: its logits are never rounded
    assert relative(result.logprobs[keep], exact.logprobs[keep]) <= 2 * relative(plain_logp, exact.logprobs[keep])
    # An entropy is a difference of two terms as large as the target's log-prob, which is -50 here at worst.
    assert relative(result.entropy[keep], exact.entropy[keep]) <= 6e-6
    assert abs(result.loss.item() - exact.loss.item()) <= 2 * abs(plain_loss.item() - exact.loss.item()) + 1e-6
    for mine, theirs, truth in zip(ours, plain, exact_gradients, strict=True):
        assert relative(mine, truth) <= 2 * relative(theirs, truth)
        assert relative(mine, truth) <= bound
        assert mine.double().norm() == pytest.approx(truth.norm().item(), rel=1e-3)


# --- what is not computed ---------------------------------------------------------------------------------------------


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
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 16 * 1003 * 4)
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
    assert largest == 16 * 1008  # rows start at multiples of 64 bytes


# --- awkward inputs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *FUSED])
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


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_policy_that_ran_away_gives_no_nan(loss_type: str, sign: float, backend: str) -> None:
    args = cast(problem(), torch.float32)
    args["old_logprobs"] = args["old_logprobs"] - sign * 200  # exp(200) overflows fp32
    for advantage in (0.0, 1.0, -1.0):
        args["advantages"] = torch.full((37,), advantage)
        result, d_hidden, d_weight = gradients({**args, "loss_type": loss_type, "backend": backend})
        assert all(x.isfinite().all() for x in (result.loss, d_hidden, d_weight))


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_masked_rows_may_hold_anything_and_get_no_gradient(loss_type: str, backend: str) -> None:
    loss_args = {
        **cast(problem(), torch.float32),
        "loss_type": loss_type,
        "beta": 0.1,
        "importance": "truncate",
        "backend": backend,
    }
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


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_empty_mask_is_a_connected_zero(loss_type: str, backend: str) -> None:
    args = cast(problem(), torch.float32)
    args["mask"][:] = False
    result, d_hidden, d_weight = gradients({**args, "loss_type": loss_type, "backend": backend, "beta": 0.1})
    assert result.loss.item() == 0
    assert d_hidden.shape == (37, 16)
    assert not d_hidden.any()
    assert not d_weight.any()
    assert result.metrics.trained_tokens == 0
    assert result.metrics.ratio_mean.isfinite()
    assert token_logprobs(args["hidden"], args["lm_head_weight"], args["targets"], args["mask"])[0].isnan().all()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_row(loss_type: str, backend: str) -> None:
    args = cast(problem(n=1), torch.float32)
    args["mask"][:] = True
    loss_args = {**args, "loss_type": loss_type}
    expected, *expected_gradients = gradients(cast({**loss_args, "backend": "reference"}, torch.float64))
    result, *ours = gradients({**loss_args, "backend": backend})
    torch.testing.assert_close(result.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for mine, truth in zip(ours, expected_gradients, strict=True):
        assert relative(mine, truth) < 1e-5


@pytest.mark.parametrize("backend", FUSED)
def test_hopeless_targets_among_many_get_a_better_anchor(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets with log-probs below -150, whose sums overflow, in several chunks and more than one repair each."""
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 60 * 1003 * 4)
    monkeypatch.setattr(fused, "REPAIR_ROWS", 7)
    args = cast(problem(n=200, d=16, v=1003, scale=30.0), torch.float32)
    now, _ = token_logprobs(*(args[k] for k in ("hidden", "lm_head_weight", "targets", "mask")))
    trained = now[args["mask"]]
    assert trained.min() < -150
    assert 20 < (trained < -60).sum() < len(trained) - 20
    args["old_logprobs"] = now + 0.1
    for entropy_coef in (0.0, 0.1):
        loss_args = {**args, "entropy_coef": entropy_coef, "backend": backend}
        expected, *expected_gradients = gradients(cast({**loss_args, "backend": "reference"}, torch.float64))
        result, *ours = gradients(loss_args)
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=2e-6, atol=1e-4, equal_nan=True)
        torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-4, atol=1e-4, equal_nan=True)
        for mine, truth in zip(ours, expected_gradients, strict=True):
            assert relative(mine, truth) < 1e-4


def test_strided_hidden_and_tied_weight() -> None:
    args = problem(n=30, d=8, v=50)
    ids = torch.randint(0, 50, (30,), generator=torch.Generator().manual_seed(0))
    answers = []
    args = cast(args, torch.float32)
    for backend in ("reference", *FUSED):
        embedding = args["lm_head_weight"].detach().clone().requires_grad_()
        wide = torch.stack([embedding[ids], args["hidden"]], dim=2)
        hidden = wide.tanh()[..., 0]  # rows and columns strided, made from the weight itself
        assert not hidden.is_contiguous()
        loss = grpo_loss(**{**args, "hidden": hidden, "lm_head_weight": embedding}, backend=backend).loss
        answers.append(torch.autograd.grad(loss, embedding)[0])
    for answer in answers[1:]:
        assert relative(answer, answers[0]) < 1e-5
    assert answers[0].norm() > 1e-3


@pytest.mark.parametrize("backend", FUSED)
def test_strided_weight(backend: str) -> None:
    args = {**cast(problem(), torch.float32), "backend": backend}
    _, *expected = gradients(args)
    args["lm_head_weight"] = args["lm_head_weight"].T.contiguous().T
    assert args["lm_head_weight"].stride(1) != 1
    _, *found = gradients(args)
    for mine, theirs in zip(found, expected, strict=True):
        assert relative(mine, theirs.double()) < 1e-6


@pytest.mark.parametrize("backend", ["reference", *FUSED])
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


# --- would the tests notice? ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupted_kernel_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(name, monkeypatch)
    with pytest.raises(AssertionError):
        test_native_is_near_the_reference_in_fp64("dapo", "entropy", off_policy=True)
    with pytest.raises(AssertionError):
        test_torch_equals_the_reference_in_fp64("dapo", "entropy", off_policy=True)
