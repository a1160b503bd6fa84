"""The Triton kernels against the torch references beside them and fp64; on a GPU where there is one, else interpreted.

C rows, D hidden size, V vocabulary, as in `negotiator_kernels.exponentials`.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from negotiator_kernels import exponentials as reference
from negotiator_kernels import fused, triton_exponentials, triton_gemm, triton_kernels, triton_objective
from negotiator_kernels import reference as formula
from negotiator_kernels.reference import LossSpec, Rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see conftest.py
ROOT = Path(__file__).parent.parent
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy
# An error, as a ratio of norms, may be this many times that of plain torch in the same dtypes, or a few units in the
# last place of fp32.
TIMES = 3.0
FLOOR = 2e-6  # a GPU sums up in its own order


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """Several tiles a row and several steps a tile in small shapes."""
    monkeypatch.setattr(reference, "TILE_STEP", 96)
    monkeypatch.setitem(reference.TILE_BYTES, DEVICE, 1)
    monkeypatch.setattr(triton_exponentials, "BLOCK", 64)
    if INTERPRETED:  # it makes arrays of scalars, which NumPy from 2.4 on does not take for loop bounds
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patch_and_index(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_and_index)


def problem(kind: str, rows: int, size: int, vocabulary: int, dtype: torch.dtype):
    """hidden, weight, temperature and anchors up to 2 nats away from the log-sum-exps."""
    g = torch.Generator().manual_seed(rows + vocabulary)
    hidden, weight = torch.randn(rows, size, generator=g), torch.randn(vocabulary, size, generator=g) / size**0.5
    temperature = 1.0 if kind == "plain" else 0.7
    if kind == "peaked":
        weight *= 12
    elif kind == "negative":  # every logit, about -60; columns past the vocabulary would dwarf the others
        hidden, weight = hidden.abs() + 5, -(weight.abs() + 10 / size)
    elif kind == "spread":  # half of the logits 2e4 below the others
        hidden[:, 0], weight[::2, 0], weight[1::2, 0] = 100, -150, 1
    hidden, weight = hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype)
    noise = (4 * torch.rand(rows, generator=g) - 2).to(DEVICE)
    return hidden, weight, temperature, (hidden.double() @ weight.double().T / temperature).logsumexp(1).float() + noise


def poisoned(rows: int, columns: int, dtype: torch.dtype, padding: int) -> torch.Tensor:
    """[rows, columns] of NaN that lie in a wider matrix of NaN."""
    return torch.full((rows, columns + padding), math.nan, dtype=dtype, device=DEVICE)[:, :columns]


def error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm()).item()


def stored(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 values as a kernel stores them: the interpreter cuts off what does not fit into bf16, a GPU rounds."""
    if INTERPRETED and dtype == torch.bfloat16:
        values = values.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
    return values.to(dtype)


def check(ours, plain, truth) -> None:
    assert len(ours) == len(plain) == len(truth)
    for found, expected, exact in zip(ours, plain, truth, strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert error(found, exact) <= max(TIMES * error(expected, exact), FLOOR)
        if found.dtype == torch.bfloat16:  # equal, unless the last place of fp32 decides which way a value is rounded
            normal = expected.abs() >= torch.finfo(torch.float32).tiny
            assert ((found != expected) & normal).sum() <= 1 + 0.02 * found.numel()


def check_exponentials(kernel, kind: str, shape: tuple[int, int, int], dtype: torch.dtype, padding: int) -> None:
    rows, _, vocabulary = shape
    hidden, weight, temperature, anchors = problem(kind, *shape, dtype)
    out, plain, exact = (poisoned(rows, vocabulary, t, padding) for t in (dtype, torch.float32, torch.float64))
    wide = hidden.double(), weight.double(), anchors.double()
    check(
        (*kernel(hidden, weight, anchors, temperature, out), out),
        (*reference.exponentials(hidden, weight, anchors, temperature, plain), stored(plain, dtype)),
        (*reference.exponentials(*wide, temperature, exact), exact),
    )
    assert out._base[:, vocabulary:].isnan().all()


KINDS = ("plain", "peaked", "negative", "spread")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_exponentials_by_tile(kind, dtype):
    for shape, padding in (((1, 33, 7), 0), ((5, 16, 300), 3), ((13, 40, 257), 15)):
        check_exponentials(triton_exponentials.exponentials, kind, shape, dtype, padding)


@pytest.mark.parametrize("kind", KINDS)
def test_exponentials_as_a_gemm(kind):
    for shape, padding in (((1, 8, 7), 1), ((130, 72, 600), 8), ((3, 136, 258), 6), ((257, 64, 256), 0)):
        check_exponentials(triton_gemm.exponentials, kind, shape, torch.bfloat16, padding)


both = pytest.mark.parametrize("kernel", [triton_exponentials.exponentials, triton_gemm.exponentials])


@both
def test_overflow_and_nan_show_in_their_own_row(kernel):
    hidden, weight, temperature, anchors = problem("plain", 5, 16, 264, torch.bfloat16)
    anchors[1] -= 200
    hidden[3, 0] = math.nan
    sums, _ = kernel(hidden, weight, anchors, temperature, poisoned(5, 264, torch.bfloat16, 0))
    assert sums[1] == math.inf
    assert sums[3].isnan()
    assert sums[[0, 2, 4]].isfinite().all()


@both
def test_logit_of_minus_infinity_counts_nothing(kernel):
    hidden, weight, temperature, anchors = problem("plain", 5, 16, 264, torch.bfloat16)
    hidden[:, 0] = 1
    out, shorter = poisoned(5, 264, torch.bfloat16, 0), poisoned(5, 263, torch.bfloat16, 0)
    expected = reference.exponentials(hidden, weight[:-1], anchors, temperature, shorter)
    weight[-1, 0] = -math.inf
    found = kernel(hidden, weight, anchors, temperature, out)
    assert (out[:, -1] == 0).all()
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-5, atol=1e-5)


@both
def test_sums_are_the_same_without_values(kernel):
    hidden, weight, temperature, anchors = problem("peaked", 7, 16, 264, torch.bfloat16)
    expected = kernel(hidden, weight, anchors, temperature, poisoned(7, 264, torch.bfloat16, 0))
    found = kernel(hidden, weight, anchors, temperature, None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@both
def test_no_rows(kernel):
    hidden, weight, temperature, _ = problem("plain", 1, 16, 264, torch.bfloat16)
    found = kernel(hidden[:0], weight, torch.empty(0, device=DEVICE), temperature, poisoned(0, 264, torch.bfloat16, 0))
    assert [value.shape for value in found] == [(0,), (0,)]


def test_order_of_the_gemms_tiles_changes_no_bit(monkeypatch):
    hidden, weight, temperature, anchors = problem("peaked", 300, 72, 600, torch.bfloat16)
    results = []
    for group in (1, 2, 32):
        monkeypatch.setattr(triton_gemm, "GROUP", group)
        out = poisoned(300, 600, torch.bfloat16, 0)
        results.append((*triton_gemm.exponentials(hidden, weight, anchors, temperature, out), out))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gemm_says_what_it_does_not_take():
    hidden, weight, temperature, anchors = problem("plain", 5, 16, 264, torch.bfloat16)
    out = poisoned(5, 264, torch.bfloat16, 0)
    for x, w, values, message in (
        (hidden.float(), weight, out, "hidden must be bf16"),
        (hidden[:, :12].contiguous(), weight[:, :12].contiguous(), out, "row of hidden"),
        (hidden, weight.T.contiguous().T, out, "row of weight"),
        (hidden, weight, poisoned(5, 264, torch.bfloat16, 1), "row of out"),
        (hidden, weight[:260], out[:, 4:], "row of out"),
    ):
        with pytest.raises(ValueError, match=message):
            triton_gemm.exponentials(x, w, anchors, temperature, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 5])
def test_entropy_gradient(dtype, padding):
    rows, vocabulary = 5, 203
    g = torch.Generator().manual_seed(0)
    logs = (12 * torch.randn(rows, vocabulary, generator=g)).to(DEVICE)
    logs[:, ::7] = -math.inf
    values = poisoned(rows, vocabulary, dtype, padding)
    values.copy_(logs.exp())
    alpha, beta = torch.randn(2, rows, generator=g).to(DEVICE)
    plain, exact = values.to(torch.float32, copy=True), values.double()
    triton_exponentials.entropy_gradient_(values, alpha, beta)
    reference.entropy_gradient_(plain, alpha, beta)
    reference.entropy_gradient_(exact, alpha.double(), beta.double())
    assert (values[:, ::7] == 0).all()
    for row in range(rows):  # one by one, because the largest value of all outweighs whole rows
        check([values[row]], [stored(plain[row], dtype)], [exact[row]])
    assert values._base[:, vocabulary:].isnan().all()


def spec(**changes) -> LossSpec:
    plain = {
        "loss_type": "dapo", "temperature": 1.0, "clip_low": 0.2, "clip_high": 0.3, "beta": 0.0, "entropy_coef": 0.0,
        "importance": "none", "importance_cap": 1.2, "denominator": 17.0,
    }  # fmt: skip
    return LossSpec(**(plain | changes))


def objective_rows(on_policy: bool) -> tuple[torch.Tensor, torch.Tensor, Rows]:
    """Log-probs, entropies and rows that reach every branch: both clips and their ends, both bounds of the exponents,
    equal sides of the minimum, weights below, between and above the caps."""
    g = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(300, generator=g)
    old, sampling, ref = (logprobs + 0.4 * torch.randn(300, generator=g) for _ in range(3))
    advantages = torch.randn(300, generator=g)
    old[:50] = logprobs[:50]
    old[50:60] = logprobs[50:60] - 90
    advantages[60:70] = 0
    ref[70:80] = logprobs[70:80] + 90
    sampling[80:90] = old[80:90] - 100
    sequence = torch.randint(0, 7, (300,), generator=g)
    rows = Rows(
        targets=torch.zeros(300, dtype=torch.long, device=DEVICE),
        advantages=advantages.to(DEVICE),
        sampling_logprobs=sampling.to(DEVICE),
        old_logprobs=None if on_policy else old.to(DEVICE),
        ref_logprobs=ref.to(DEVICE),
        sequence=sequence.to(DEVICE),
        sequence_rows=(torch.bincount(sequence, minlength=7) + 3).to(DEVICE),  # some rows are elsewhere
    )
    return logprobs.to(DEVICE), torch.rand(300, generator=g).to(DEVICE), rows


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo"])
def test_objective_gradient_is_autograds(loss_type, on_policy):
    logprobs, entropy, rows = objective_rows(on_policy)
    for importance, (beta, entropy_coef), clip in itertools.product(
        ("none", "truncate", "mask"), ((0.0, 0.0), (0.3, 0.01)), ({}, {"clip_low": 0.0, "clip_high": 0.0})
    ):
        of = spec(loss_type=loss_type, importance=importance, beta=beta, entropy_coef=entropy_coef, **clip)
        found = triton_objective.objective_gradient(logprobs, entropy, rows, of)
        expected = fused.objective_gradient(logprobs, entropy, rows, of)
        # Terms of both signs are added, so what is left may be less exact than they were.
        typical = expected.abs().median(dim=1, keepdim=True).values
        assert ((found - expected).abs() <= 1e-5 * expected.abs() + 1e-6 * typical).all()
        assert torch.equal(found == 0, expected == 0)  # such rows are skipped


def test_objective_gradient_without_sampling_logprobs():
    logprobs, entropy, rows = objective_rows(on_policy=True)
    of = spec(importance="mask")
    bare = Rows(rows.targets, rows.advantages, None, None, None, None, None)
    found = triton_objective.objective_gradient(logprobs, entropy, bare, of)
    torch.testing.assert_close(found, fused.objective_gradient(logprobs, entropy, bare, of))


@pytest.mark.parametrize(
    ("kernels", "dtype", "bound"),
    [(triton_kernels.VENDOR_GEMM, torch.float32, 2e-6), (triton_kernels.FUSED_GEMM, torch.bfloat16, 6e-3)],
    ids=["triton", "triton_gemm"],
)
def test_the_whole_loss(kernels, dtype, bound):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(20, 24, generator=g).to(DEVICE, dtype),
        torch.randn(264, 24, generator=g).to(DEVICE, dtype),
    )
    targets = torch.randint(0, 264, (20,), generator=g).to(DEVICE)
    advantages = torch.randn(20, generator=g).to(DEVICE)
    advantages[::5] = 0
    rows = Rows(targets, advantages, None, None, None, None, None)
    for entropy_coef in (0.0, 0.3):
        of = spec(entropy_coef=entropy_coef, temperature=0.7)
        found = [t.clone().requires_grad_() for t in (hidden, weight)]
        exact = [t.double().requires_grad_() for t in (hidden, weight)]
        result = fused.grpo_loss(*found, rows, of, kernels)
        expected = formula.grpo_loss(*exact, rows, of)
        assert result.skipped_rows == (4 if entropy_coef == 0 else 0)
        torch.testing.assert_close(result.logprobs.double(), expected.logprobs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result.entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(loss, of) for loss, of in ((result.loss, found), (expected.loss, exact)))
        for mine, truth in zip(*gradients, strict=True):
            assert error(mine, truth) <= bound


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `python -m benchmarks.aot` reports, as {label: report}."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-m", "benchmarks.aot"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {report["label"]: report for report in json.loads(done.stdout.splitlines()[-1])["kernels"]}


def test_kernels_compile_for_hopper_without_spills(compiled):
    assert all(report["spilled"] == 0 and report["shared"] <= 232_448 for report in compiled.values())
    gemms = [report for label, report in compiled.items() if "gemm" in label]
    assert gemms
    for report in gemms:
        assert report["instructions"]["HGMMA"] >= 4
        assert report["instructions"]["UTMALDG"] >= 2
        assert report["registers"] <= 255
    row_kernels = [report for label, report in compiled.items() if label.endswith((", bf16", ", fp32"))]
    assert row_kernels
    for report in row_kernels:
        assert report["instructions"]["LDG.128"] >= 2
        assert report["instructions"]["STG.128"] >= 2


def test_every_kernel_that_is_launched_is_compiled(compiled):
    launched = {
        call.func.value.id
        for path in (ROOT / "kernels" / "negotiator_kernels").glob("triton_*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }
    assert launched == {report["kernel"] for label, report in compiled.items() if not label.startswith("csrc")}


def test_the_cuda_kernels_are_in_the_library_where_a_compiler_was_found(compiled):
    """They are compiled wherever there is a CUDA compiler, GPU or not, and judged like those of Triton."""
    found = any(label.startswith("csrc") for label in compiled)
    assert found == (shutil.which("nvcc") is not None or "CUDACXX" in os.environ)
