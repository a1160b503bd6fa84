"""The operators of negotiator_kernels against their references, and both against oracles written out here."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from negotiator_kernels import exponentials, native, sample
from negotiator_kernels.availability import backends, native_off_reason
from negotiator_kernels.linear import PackedLinears
from negotiator_kernels.sampling import uniform

BACKENDS = ["reference", "native"]


def test_the_native_operators_are_built():
    assert native_off_reason() is None
    assert [backend.on for backend in backends() if (backend.name, backend.device) == ("native", "cpu")] == [True]


# --- sampling ----------------------------------------------------------------------------------------------------


def sampling_case(rows, vocabulary, spread, seed=0):
    """Arguments of sample with every kind of temperature and top_p, greedy and untruncated rows among them."""
    torch.manual_seed(seed)
    temperature = torch.rand(rows) * 2
    top_p = 1 - torch.rand(rows)
    temperature[::7] = 0.0
    top_p[::5] = 1.0
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,))
    return spread * torch.randn(rows, vocabulary), temperature, top_p, seeds, torch.randint(0, 4096, (rows,))


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 4.0, 30.0])
@pytest.mark.parametrize(("rows", "vocabulary"), [(400, 1), (400, 2), (600, 37), (300, 1000), (8, 49152)])
def test_native_sampling_equals_the_reference(rows, vocabulary, spread):
    case = sampling_case(rows, vocabulary, spread)
    ids, logprobs = sample(*case, backend="native")
    want_ids, want_logprobs = sample(*case, backend="reference")
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-6, atol=1e-7)


def test_native_sampling_equals_the_reference_with_ties_and_forbidden_tokens():
    logits, *rest = sampling_case(600, 50, 1.5)
    logits = logits.round()  # few distinct values: the nucleus ends within a run of equal logits
    logits[torch.rand_like(logits) < 0.3] = -math.inf
    got, want = (sample(logits, *rest, backend=backend) for backend in ("native", "reference"))
    assert torch.equal(got[0], want[0])
    assert logits.gather(1, got[0][:, None]).isfinite().all()


def test_native_sampling_equals_the_reference_where_the_draw_is_close():
    """Two tokens whose border lies within fp32 rounding of u: a relative error of 1e-12 in a weight changes an id."""
    rows = 100_000
    seeds, positions = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    u = uniform(seeds, positions)
    logits = torch.stack([torch.zeros(rows), ((1 - u) / u).log().float()], 1)
    case = (logits, torch.ones(rows), torch.ones(rows), seeds, positions)
    ids, _ = sample(*case, backend="native")
    assert torch.equal(ids, sample(*case, backend="reference")[0])
    assert 0.4 < ids.double().mean() < 0.6


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_takes_the_first_of_the_largest_at_temperature_1(backend):
    logits = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    zeros = torch.zeros(2, dtype=torch.int64)
    ids, logprobs = sample(logits, torch.zeros(2), torch.full((2,), 0.5), zeros, zeros, backend=backend)
    assert ids.tolist() == [1, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[:, 0].where(ids == 0, logits.log_softmax(-1)[:, 1]))


def nucleus_oracle(logits: np.ndarray, temperature: float, top_p: float) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the whole softmax and of the renormalised nucleus, by definition."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    nucleus = np.zeros_like(p)
    for token in sorted(range(len(p)), key=lambda i: (-logits[i], i)):
        if nucleus.sum() >= top_p:
            break
        nucleus[token] = p[token]
    return p, nucleus / nucleus.sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.95), (1.5, 0.6), (0.3, 0.9)])
def test_tokens_are_drawn_from_the_nucleus_in_proportion(backend, temperature, top_p):
    draws = 20_000
    logits = torch.tensor([0.3, -1.0, 2.0, 1.1, 0.9, -0.2, 1.1, -3.0, 0.0, 1.6])
    p, nucleus = nucleus_oracle(logits.numpy(), temperature, top_p)
    seeds, positions = torch.arange(draws) // 100, torch.arange(draws) % 100
    ids, logprobs = sample(
        logits.expand(draws, -1), torch.full((draws,), temperature), torch.full((draws,), top_p), seeds, positions,
        backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(logprobs.double(), torch.from_numpy(np.log(p))[ids], rtol=1e-6, atol=1e-6)
    counts = np.bincount(ids, minlength=len(p))
    assert (counts > 0).tolist() == (nucleus > 0).tolist()
    inside = nucleus > 0
    chi_square = ((counts - draws * nucleus)[inside] ** 2 / (draws * nucleus[inside])).sum()
    freedom = inside.sum() - 1
    assert chi_square < freedom + 3 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("vocabulary", "top_p", "size"), [(4, 0.5, 2), (8, 0.75, 6), (8, 0.76, 7), (1024, 0.125, 128)])
def test_a_nucleus_that_reaches_top_p_exactly_ends_there(backend, vocabulary, top_p, size):
    """Equal logits have probabilities that add up without rounding; the lower index ranks higher."""
    rows = 20 * size
    ids, _ = sample(
        torch.zeros(rows, vocabulary), torch.ones(rows), torch.full((rows,), top_p), torch.arange(rows),
        torch.zeros(rows, dtype=torch.int64), backend=backend,
    )  # fmt: skip
    assert ids.unique().tolist() == list(range(size))


def test_the_random_numbers_are_splitmix64_of_seed_and_position():
    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    for seed, position in [(0, 0), (1, 0), (0, 1), (-5, 3), (2**63 - 1, 4095)]:
        want = (mix((mix((seed + golden) % 2**64) + (position + 1) * golden) % 2**64) >> 11) / 2**53
        assert uniform(torch.tensor([seed]), torch.tensor([position])).item() == want


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_rest_of_the_batch(backend):
    case = sampling_case(40, 500, 3.0)
    before = case[0].clone()
    ids, logprobs = sample(*case, backend=backend)
    assert torch.equal(case[0], before)
    for row in range(40):
        alone = sample(*(argument[row : row + 1] for argument in case), backend=backend)
        assert (alone[0].item(), alone[1].item()) == (ids[row].item(), logprobs[row].item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampling_names_what_does_not_fit(backend):
    logits, temperature, top_p, seeds, positions = sampling_case(3, 10, 1.0)
    for wrong, message in [
        ((logits.double(), temperature, top_p, seeds, positions), "logits must be"),
        ((logits, temperature[:2], top_p, seeds, positions), "temperature must be"),
        ((logits, temperature, top_p.double(), seeds, positions), "top_p must be"),
        ((logits, temperature, top_p, seeds.int(), positions), "seeds must be"),
        ((logits, temperature, top_p, seeds, positions[None]), "positions must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(*wrong, backend=backend)
    for row, (name, value) in enumerate([("nan", math.nan), ("inf", math.inf), ("forbidden", -math.inf)]):
        broken = logits.clone()
        broken[row, slice(None) if name == "forbidden" else 4] = value
        with pytest.raises(ValueError, match=f"row {row} cannot be sampled"):
            sample(broken, temperature, top_p, seeds, positions, backend=backend)
    for bad_temperature, bad_top_p in [(-1.0, 0.5), (1.0, 0.0), (1.0, 1.5), (math.nan, 0.5)]:
        with pytest.raises(ValueError, match="row 0 cannot be sampled"):
            sample(
                logits[:1], torch.tensor([bad_temperature]), torch.tensor([bad_top_p]), seeds[:1], positions[:1],
                backend=backend,
            )  # fmt: skip


# --- exponentials and products of the loss -----------------------------------------------------------------------


DTYPES = (torch.float32, torch.bfloat16)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 16, 101), (50, 577, 1003), (13, 64, 16), (9, 128, 97)], ids=str)
def test_native_exponentials(shape, dtype, out_dtype):
    rows, depth, vocabulary = shape
    torch.manual_seed(rows)
    hidden, weight = (3 * torch.randn(rows, depth)).to(dtype), (torch.randn(vocabulary, depth) / depth**0.5).to(dtype)
    anchors = torch.randn(rows) + 2
    wide = torch.full((rows, vocabulary + 3), math.nan, dtype=out_dtype)
    out, exact = wide[:, :vocabulary], torch.empty(rows, vocabulary, dtype=torch.float64)
    sums, moments = native.exponentials(hidden, weight, anchors, 0.7, out)
    expected = exponentials.exponentials(hidden.double(), weight.double(), anchors.double(), 0.7, exact)
    assert relative_error(sums, expected[0]) < 1e-5
    assert relative_error(moments, expected[1]) < 1e-5
    assert relative_error(out, exact) < (1e-5 if out_dtype == torch.float32 else 3e-3)
    assert wide[:, vocabulary:].isnan().all()
    for value, same in zip((sums, moments), native.exponentials(hidden, weight, anchors, 0.7, None), strict=True):
        assert torch.equal(value, same)


def test_native_exponentials_from_minus_infinity_to_overflow():
    anchors = torch.tensor([0.0, -80.0, -89.0, 86.0, 104.0, math.nan])
    hidden, weight = torch.ones(6, 1), torch.tensor([[0.0], [-1e30], [-math.inf]])
    out = torch.empty(6, 3)
    sums, moments = native.exponentials(hidden, weight, anchors, 1.0, out)
    assert out[0].tolist() == [1.0, 0.0, 0.0]
    assert (sums[0], moments[0]) == (1.0, 0.0)
    assert sums[1].item() == pytest.approx(math.exp(80), rel=1e-6)
    assert moments[1].item() == pytest.approx(80 * math.exp(80), rel=1e-6)
    assert sums[2] == math.inf
    assert sums[3].item() == pytest.approx(math.exp(-86), rel=1e-6)
    assert sums[4] == 0
    assert sums[5].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("right_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 16, 101), (50, 577, 103), (100, 2500, 700), (13, 64, 16)], ids=str)
def test_native_product_is_summed_in_fp32(shape, right_dtype, dtype):
    rows, depth, columns = shape
    torch.manual_seed(rows)
    left, right = torch.randn(rows, depth).to(dtype), torch.randn(depth, columns).to(right_dtype)
    total = torch.randn(rows, columns)
    expected = total.double() + left.double() @ right.double()
    for operand in (left, left.T.contiguous().T):
        found = total.clone()
        torch.ops.negotiator_kernels.add_product(found, operand, right)
        assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("rows", [1, 6, 13, 64])
@pytest.mark.parametrize(("outputs", "inputs"), [(5, 3), (16, 600), (101, 64)])
def test_packed_linear_layers_compute_the_same(outputs, inputs, rows):
    torch.manual_seed(rows)
    layer, other = torch.nn.Linear(inputs, outputs), torch.nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(rows, inputs)
    expected = x.double() @ layer.weight.double().T + layer.bias.double()
    with torch.no_grad(), PackedLinears([layer.weight]):
        found, cubed = layer(x), layer(x.expand(2, rows, inputs))
        assert torch.equal(other(x), F.linear(x, other.weight))
    assert relative_error(found, expected) < 1e-6
    assert torch.equal(cubed[0], found) and torch.equal(cubed[1], found)
    with torch.no_grad():
        assert relative_error(layer(x), expected) < 1e-6


def test_packed_linear_layers_are_what_is_computed_with():
    layer = torch.nn.Linear(8, 8)
    x = torch.randn(4, 8)
    with torch.no_grad():
        packed, before = PackedLinears(layer.parameters()), layer(x)
        layer.weight.zero_()
        with packed:
            assert relative_error(layer(x), before.double()) < 1e-6
        assert torch.equal(layer(x), layer.bias.expand(4, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(1, 2), (37, 30), (48, 64), (101, 46)])
def test_packed_weights_hold_every_number_once_and_zeros(columns, depth, dtype):
    """In which order is the kernels' own affair; `test_native_decoder.py` multiplies with them."""
    pack = torch.ops.negotiator_kernels.pack_linear
    weight, second = (torch.randn(columns, depth + 3).to(dtype)[:, :depth] for _ in range(2))
    packed, both = pack(weight), pack(weight, second)
    panels, rows, panel = packed.shape
    assert (packed.dtype, rows, panels) == (dtype, depth, -(-columns // panel))
    zeros = torch.zeros(packed.numel() - weight.numel(), dtype=dtype)
    assert torch.equal(packed.flatten().sort().values, torch.cat([weight.flatten(), zeros]).sort().values)
    assert torch.equal(both[0::2], packed)
    assert torch.equal(both[1::2], pack(second.contiguous()))


def test_packing_names_what_does_not_fit():
    pack = torch.ops.negotiator_kernels.pack_linear
    weight = torch.ones(4, 6)
    for wrong, message in (
        ((weight.double(),), "weight must be float32 or bfloat16"),
        ((weight[0],), "weights must be"),
        ((weight.T,), "contiguous last dimension"),
        ((weight.bfloat16()[:, :5],), "even depth"),
        ((weight, weight[:3]), "of one size and dtype"),
        ((weight, weight.bfloat16()), "of one size and dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(*wrong)


def test_weights_that_cannot_be_packed_stay_with_torch():
    layer = torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    x = torch.randn(4, 8).bfloat16()
    with torch.no_grad(), PackedLinears(layer.parameters()):
        assert layer(x).dtype == torch.bfloat16


def test_native_operators_of_the_loss_check_their_arguments():
    hidden, weight, anchors = torch.ones(2, 4), torch.ones(3, 4), torch.ones(2)
    out = torch.ones(2, 3)
    for name, arguments in (
        ("hidden", (hidden.double(), weight, anchors, 1.0, out)),
        ("weight", (hidden, weight[:, :3], anchors, 1.0, out)),
        ("weight", (hidden, weight.bfloat16(), anchors, 1.0, out)),
        ("anchors", (hidden, weight, anchors[:1], 1.0, out)),
        ("out", (hidden, weight, anchors, 1.0, out.T)),
        ("out", (hidden, weight, anchors, 1.0, torch.ones(3, 2).T)),
    ):
        with pytest.raises(RuntimeError, match=name):
            native.exponentials(*arguments)
    for name, arguments in (
        ("total", (out.double(), hidden, weight.T.contiguous())),
        ("right", (out, hidden, weight)),
        ("right", (out, hidden, weight.T)),
        ("right", (out, hidden, weight.T.contiguous().half())),
    ):
        with pytest.raises(RuntimeError, match=name):
            torch.ops.negotiator_kernels.add_product(*arguments)
