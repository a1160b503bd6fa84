# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def, assignment"
"""`sample` for a GPU: one launch, one program a row, nothing sorted and nothing waited for.

The nucleus is all logits above a cut and the first few, in order of index, of those that equal it. The cut is searched
for: the masses above CUTS thresholds, spread over the logits still in question, tell between which two of them it is;
the logits between those are copied together, and the next thresholds are spread over them alone. It ends when one
value is left. A pass over the row then finds the token where the nucleus's cumulative mass exceeds u times the whole.
Greedy rows take the same way: their nucleus is the first of the largest.

Masses are probabilities as fixed-point numbers in int64, relative to the largest: their sums have no rounding, so that
those of the search, of tiles and of prefixes agree exactly, whatever is added to what in which order. Where V is some
150,000 each is wrong by up to 2**-45 of the largest, which moves a draw only if u is within about 1e-12 of a border.

B = rows, V = vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS, STAGES = 4096, 16, 3
CUTS = tl.constexpr(8)
# How a block lies in the threads: each has so many groups, far apart, of so many logits, side by side.
GROUPS, VECTOR = tl.constexpr(2), tl.constexpr(4)
# One number a row, often a slice of a longer tensor: code of its own for each alignment would only cost compilations.
PER_ROW = ["temperatures", "top_ps", "seeds", "positions", "ids", "logprobs"]
INFINITY = tl.constexpr(float("inf"))
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)  # as in `negotiator_kernels.sampling`


def sample(
    logits: Tensor, temperature: Tensor, top_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """See `negotiator_kernels.sample`. Rows that cannot be sampled get a log-prob of NaN."""
    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    ids, logprobs = torch.empty_like(seeds), torch.empty_like(temperature)
    if rows > 0:
        candidates = torch.empty(rows, vocabulary, dtype=torch.float32, device=logits.device)
        _sample[(rows,)](
            logits, temperature.contiguous(), top_p.contiguous(), seeds.contiguous(), positions.contiguous(),
            candidates, ids, logprobs, vocabulary, logits.stride(0),
            2.0 ** (62 - vocabulary.bit_length()),  # V of them add up to less than 2**62
            BLOCK=BLOCK, STAGES=STAGES, num_warps=WARPS,
        )  # fmt: skip
    return ids, logprobs


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def _sample(
    logits,  # [B, V] fp32
    temperatures,  # [B] fp32
    top_ps,  # [B] fp32
    seeds,  # [B] int64
    positions,  # [B] int64
    candidates,  # [B, V] fp32, room for the logits still in question
    ids,  # [B] int64, written
    logprobs,  # [B] fp32, written
    vocabulary,
    stride,
    scale,  # mass of the most probable token, a power of 2
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    candidates += row * vocabulary
    temperature = tl.load(temperatures + row)
    top_p = tl.load(top_ps + row)
    lowest, highest = _range(logits, vocabulary, BLOCK, STAGES)
    if (temperature >= 0) & (top_p > 0) & (top_p <= 1) & (highest > -INFINITY) & (highest < INFINITY):
        factor = 1.0 / tl.where(temperature == 0, 1.0, temperature).to(tl.float64)
        # Nothing has a mass from half as far below the highest on; what the difference is rounded by does not matter.
        lowest = tl.maximum(lowest, (highest - 2 * tl.log(4.0 * tl.cast(scale, tl.float64)) / factor).to(tl.float32))
        cuts = _spread(lowest, highest)
        masses = _masses(logits, vocabulary, cuts, highest, factor, scale, BLOCK, STAGES)
        total = masses[0]

        # The nucleus: all logits above `cut`, the first `ties` of those equal to it, and the mass of both.
        if temperature == 0:
            cut = highest
            ties = 1
            nucleus = _mass(highest, highest, factor, scale)
        elif top_p == 1:
            cut = -INFINITY
            ties = 0
            nucleus = total
        else:
            aim = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            aim = tl.minimum(tl.maximum(aim, 1), total)
            low, end, above = _bracket(cuts, masses, above=tl.zeros_like(aim), aim=aim)
            count, low, high = _keep(logits, candidates, vocabulary, low, end, BLOCK, STAGES)
            while low < high:
                cuts = _spread(low, high)
                masses = _masses(candidates, count, cuts, highest, factor, scale, BLOCK, STAGES)
                low, end, above = _bracket(cuts, masses, above, aim)
                count, low, high = _keep(candidates, candidates, count, low, end, BLOCK, STAGES)
            cut = low
            mass = _mass(cut, highest, factor, scale)
            ties = ((aim - above + mass - 1) // mass).to(tl.int32)
            nucleus = above + ties * mass

        target = (_uniform(tl.load(seeds + row), tl.load(positions + row)) * nucleus.to(tl.float64)).to(tl.int64)
        target = tl.minimum(target, nucleus - 1)  # the product may have been rounded up
        token = _draw(logits, vocabulary, cut, ties, target, highest, factor, scale, BLOCK, STAGES)
        log = (tl.load(logits + token).to(tl.float64) - highest) * factor
        log -= tl.log(total.to(tl.float64) / scale)
        tl.store(ids + row, token)
        tl.store(logprobs + row, log.to(tl.float32))
    else:
        tl.store(ids + row, 0)
        tl.store(logprobs + row, float("nan"))


@triton.jit
def _range(logits, vocabulary, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The lowest finite logit of a row and the highest of all; NaN counts as infinite."""
    lowest = tl.full((BLOCK,), INFINITY, tl.float32)
    highest = tl.full((BLOCK,), -INFINITY, tl.float32)
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + place, mask=place < vocabulary, other=-INFINITY)
        logit = tl.where(logit == logit, logit, INFINITY)
        highest = tl.maximum(highest, logit)
        lowest = tl.minimum(lowest, tl.where(logit == -INFINITY, INFINITY, logit))
    return tl.min(lowest), tl.max(highest)


@triton.jit
def _mass(logit, highest, factor, scale):
    """Of tokens, `scale` for the most probable."""
    return (tl.exp((logit.to(tl.float64) - highest) * factor) * scale + 0.5).to(tl.int64)


@triton.jit
def _spread(low, high):
    """CUTS thresholds, the first `low` and the last `high`."""
    cuts = ()
    for k in tl.static_range(CUTS):
        cuts += (low * (1 - k / (CUTS - 1)) + high * (k / (CUTS - 1)),)
    return cuts


@triton.jit
def _masses(values, count, cuts, highest, factor, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Of the values from each of `cuts` on."""
    WIDTH: tl.constexpr = BLOCK // GROUPS // VECTOR
    sums = ()
    for _ in tl.static_range(CUTS):
        sums += (tl.zeros((WIDTH,), tl.int64),)
    for start in tl.range(0, count, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < count, other=-INFINITY)
        mass = _mass(value, highest, factor, scale)
        longer = ()
        for k in tl.static_range(CUTS):
            of_cut = tl.reshape(tl.where(value >= cuts[k], mass, 0), (GROUPS, WIDTH, VECTOR))
            longer += (sums[k] + tl.sum(tl.sum(of_cut, 2), 0),)  # within a thread
        sums = longer
    masses = ()
    for k in tl.static_range(CUTS):
        masses += (tl.sum(sums[k]),)
    return masses


@triton.jit
def _bracket(cuts, masses, above, aim):
    """Where the nucleus ends: not below the first result, but below the second, from which on the mass is the third.

    `masses` are those from each of `cuts` on, without what is `above` all values in question.
    """
    low = cuts[0]
    end = INFINITY
    higher = above
    for k in tl.static_range(CUTS):
        reaches = above + masses[k] >= aim
        low = tl.where(reaches, tl.maximum(low, cuts[k]), low)
        end = tl.where(reaches, end, tl.minimum(end, cuts[k]))
        higher = tl.where(reaches, higher, tl.maximum(higher, above + masses[k]))
    return low, end, higher


@triton.jit
def _keep(values, kept, count, low, end, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Copies the values in [low, end) to the front of `kept`, which may be `values`: how many, lowest and highest."""
    total = 0
    lowest = tl.full((BLOCK,), INFINITY, tl.float32)
    highest = tl.full((BLOCK,), -INFINITY, tl.float32)
    for start in tl.range(0, count, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(values + place, mask=place < count, other=-INFINITY)
        inside = (value >= low) & (value < end)
        rank = tl.cumsum(inside.to(tl.int32))
        tl.debug_barrier()  # all threads have read: what follows may overwrite the tile, but never a later one
        tl.store(kept + total + rank - 1, value, mask=inside)
        total += tl.sum(inside.to(tl.int32))
        lowest = tl.where(inside, tl.minimum(lowest, value), lowest)
        highest = tl.where(inside, tl.maximum(highest, value), highest)
    tl.debug_barrier()  # each thread will read what others wrote
    return total, tl.min(lowest), tl.max(highest)


@triton.jit
def _draw(logits, vocabulary, cut, ties, target, highest, factor, scale, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The token at which the running mass of a nucleus first exceeds `target`, which is less than all of it."""
    mass_of_tie = _mass(cut, highest, factor, scale)
    passed = tl.zeros_like(target)  # mass of the tiles before the token's
    first = 0  # of the token's tile
    passing = True
    for start in tl.range(0, vocabulary, BLOCK, num_stages=STAGES):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(logits + place, mask=place < vocabulary, other=-INFINITY)
        here = tl.minimum(tl.sum((logit == cut).to(tl.int32)), ties)
        higher = tl.where(logit > cut, _mass(logit, highest, factor, scale), 0)
        then = passed + tl.sum(higher) + here * mass_of_tie
        passing = passing & (then <= target)
        passed = tl.where(passing, then, passed)
        ties = tl.where(passing, ties - here, ties)
        first = tl.where(passing, start + BLOCK, first)
    place = first + tl.arange(0, BLOCK)
    logit = tl.load(logits + place, mask=place < vocabulary, other=-INFINITY)
    equal = logit == cut
    inside = (logit > cut) | (equal & (tl.cumsum(equal.to(tl.int32)) <= ties))
    running = passed + tl.cumsum(tl.where(inside, _mass(logit, highest, factor, scale), 0))
    return tl.min(tl.where(running > target, place, vocabulary))


@triton.jit
def _uniform(seed, position):
    """See `negotiator_kernels.sampling`: the same bits."""
    bits = _mix(_mix(seed + GOLDEN) + (position + 1) * GOLDEN)
    return _shift(bits, 11).to(tl.float64) * 2.0**-53


@triton.jit
def _mix(x):
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


@triton.jit
def _shift(x, BITS: tl.constexpr):
    """Right shift that fills with zeros."""
    return (x >> BITS) & ((1 << (64 - BITS)) - 1)
