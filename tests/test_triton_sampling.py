"""Triton's sampler against the reference, which sorts; interpreted without a GPU."""

import math
import os

import pytest
import torch
from interpreter import let_scalars_bound_loops
from test_native_ops import sampling_case

from negotiator_kernels import sample, triton_sampling
from negotiator_kernels.sampling import sample_lists, sample_reference, uniform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # see conftest.py
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of the interpreter's NumPy


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Small blocks, so that small vocabularies have several; and `tl` is patched once a test, not at every call."""
    if not INTERPRETED:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    let_scalars_bound_loops(monkeypatch)
    monkeypatch.setattr(triton_sampling, "BLOCK", 16)
    scopes = [interpreter._patch_lang(function.fn) for function in (triton_sampling._sample, tl.sum)]
    monkeypatch.setattr(interpreter, "_patch_lang", lambda fn: interpreter._LangPatchScope())
    yield
    for scope in reversed(scopes):
        scope.restore()


def check(*case):
    """What is drawn, after a comparison with the reference."""
    case = [argument.to(DEVICE) for argument in case]
    ids, logprobs = triton_sampling.sample(*case)
    want_ids, want_logprobs = sample_reference(*case)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-6, atol=1e-7, equal_nan=True)
    return ids.cpu(), logprobs.cpu()


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 30.0])
def test_equals_the_reference(spread):
    check(*sampling_case(11, 37, spread))


@pytest.mark.parametrize(("rows", "vocabulary"), [(3, 1), (6, 2), (2, 1000)])
def test_equals_the_reference_in_vocabularies_of_any_size(rows, vocabulary, monkeypatch):
    if vocabulary == 1000 and INTERPRETED:
        monkeypatch.setattr(triton_sampling, "BLOCK", 256)
    check(*sampling_case(rows, vocabulary, 2.0, seed=1))


def test_equals_the_reference_with_ties_and_forbidden_tokens():
    """The logits are part of a larger tensor, whose other numbers must not matter."""
    logits, *rest = sampling_case(26, 50, 1.5)
    logits = logits.round()  # few distinct values: the nucleus ends within a run of equal logits; zeros of both signs
    logits[torch.rand_like(logits) < 0.3] = -math.inf
    wide = torch.cat([logits, torch.full_like(logits, math.nan)], 1)[:, :50]
    assert (wide[:, :, None] == 0).any() and wide.stride(0) == 100
    ids, _ = check(wide, *rest)
    assert logits.gather(1, ids[:, None]).isfinite().all()


def test_equals_the_reference_where_the_draw_is_close():
    """Two tokens whose border lies within fp32 rounding of u."""
    rows = 30 if INTERPRETED else 100_000
    seeds, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    u = uniform(seeds, positions)
    logits = torch.stack([torch.zeros(rows), ((1 - u) / u).log().float()], 1)
    check(logits, torch.ones(rows), torch.ones(rows), seeds, positions)


def test_a_nucleus_that_reaches_top_p_exactly_ends_there():
    """Equal logits have probabilities that add up without rounding; the lower index ranks higher."""
    rows = 40
    ids, _ = check(
        torch.zeros(1, 8).expand(rows, -1), torch.ones(rows), torch.full((rows,), 0.75), torch.arange(rows),
        torch.arange(rows),
    )  # fmt: skip
    assert ids.unique().tolist() == list(range(6))


def test_logits_of_any_size():
    """Distances that overflow, that are lost beside the logits, and that take many steps to search."""
    powers = -(2.0 ** torch.arange(0, -40, -1))
    logits = torch.stack(
        [
            torch.cat([torch.tensor([3e38, -3e38]), torch.zeros(38)]),
            1e9 + 64 * torch.arange(40.0),
            powers,
            1e-30 * powers,
            10 + 1e-6 * torch.arange(40.0),
        ]
    )
    temperature = torch.tensor([1e38, 40.0, 0.5, 1.0, 1e-6])
    for top_p in (0.4, 0.97):
        check(logits, temperature, torch.full((5,), top_p), torch.arange(5), torch.arange(5))


def test_rows_that_cannot_be_sampled_have_no_log_prob():
    logits, temperature, top_p, seeds, positions = sampling_case(9, 20, 1.0)
    temperature, top_p = temperature + 0.1, top_p.clamp(0.1, 0.9)
    for row, value in enumerate([math.nan, -math.nan, math.inf]):
        logits[row, 17] = value
    logits[3] = -math.inf
    temperature[4], temperature[5], top_p[6], top_p[7] = -1.0, math.nan, 0.0, 1.5
    case = [argument.to(DEVICE) for argument in (logits, temperature, top_p, seeds, positions)]
    assert triton_sampling.sample(*case)[1].isnan().tolist() == [True] * 8 + [False]
    check(*(argument[8:] for argument in case))


def test_no_rows():
    ids, logprobs = check(*(argument[:0] for argument in sampling_case(1, 20, 1.0)))
    assert ids.shape == logprobs.shape == (0,)


def test_lists_are_those_of_sample():
    logits, *rest = sampling_case(30, 50, 1.0)
    logits, rest = logits.to(DEVICE), [argument.to(DEVICE) for argument in rest]
    lists = [argument.tolist() for argument in rest]
    for backend in ["auto", "reference"] if INTERPRETED else ["auto", "reference", "triton"]:
        ids, logprobs = sample(logits, *rest, backend=backend)
        assert sample_lists(logits, *lists, backend=backend) == (ids.tolist(), logprobs.tolist())
    logits[3, 5] = math.nan
    with pytest.raises(ValueError, match=rf"row 3 cannot be sampled: temperature {lists[0][3]} must"):
        sample_lists(logits, *lists)


@pytest.mark.skipif(not INTERPRETED, reason="with a GPU the backend is on")
def test_is_refused_without_a_gpu():
    with pytest.raises(ValueError, match="backend triton is off: torch"):
        sample(*sampling_case(1, 20, 1.0), backend="triton")


def test_tokens_beyond_the_ties_stay_out_where_more_probable_ones_follow():
    """32 equal tokens, of which 8 are in the nucleus, in other blocks than the 16 above them."""
    rows = 40
    logits = torch.cat((torch.zeros(32), torch.ones(16))).repeat(rows, 1)
    top_p = (16 * math.e + 7.5) / (16 * math.e + 32)
    ones, seeds = torch.ones(rows), torch.arange(rows)
    ids, _ = check(logits, ones, torch.full((rows,), top_p), seeds, torch.zeros_like(seeds))
    assert set(ids.tolist()) <= {*range(8), *range(32, 48)}
    assert {*range(8)} & {*ids.tolist()} and {*range(32, 48)} & {*ids.tolist()}


def test_the_smallest_random_number_takes_the_first_token_of_the_nucleus():
    seeds, positions = torch.tensor([-4188647063337296395]), torch.tensor([0])
    assert uniform(seeds, positions) == 0
    case = torch.tensor([[-math.inf, -5.0, 0.0, 1.0]]), torch.ones(1), torch.tensor([0.9]), seeds, positions
    assert check(*case)[0].tolist() == [2]
    assert sample(*case)[0].tolist() == [2]
