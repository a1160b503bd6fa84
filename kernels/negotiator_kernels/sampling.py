"""Temperature and nucleus sampling, one independent seeded stream of random numbers per row.

B = rows, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from negotiator_kernels.availability import native_off_reason, triton_off_reason

Backend = Literal["auto", "reference", "native", "triton"]


def sample(
    logits: torch.Tensor,  # [B, V] fp32, left as it is
    temperature: torch.Tensor,  # [B] fp32, 0 is greedy
    top_p: torch.Tensor,  # [B] fp32, in (0, 1]
    seeds: torch.Tensor,  # [B] int64
    positions: torch.Tensor,  # [B] int64, index of the token within its generation
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # [B] int64, [B] fp32
    """Draws one token a row; returns ids and their log-probs under the whole vocabulary, before truncation.

    The nucleus is the smallest set of most probable tokens whose probability reaches `top_p`, equal logits in order of
    index. The token is where the nucleus's cumulative probability, in order of index, first exceeds u times its mass;
    u depends on the row's seed and position alone, so a row's result does not depend on the rest of the batch.
    Greedy rows take the lowest index of the largest logit, with its log-prob at temperature 1.

    `auto` is `native` on the CPU, `triton` on CUDA devices, and `reference` where that is off. Raises ValueError for
    arguments that do not fit together and for a row that cannot be sampled: temperature below 0, top_p outside (0, 1],
    NaN or +inf among its logits or nothing but -inf.
    """
    ids, logprobs = _sample(logits, temperature, top_p, seeds, positions, backend)
    if (bad := logprobs.isnan()).any():
        row = int(bad.nonzero()[0])
        raise _refusal(row, float(temperature[row]), float(top_p[row]))
    return ids, logprobs


def sample_lists(
    logits: torch.Tensor,  # [B, V] fp32, left as it is
    temperature: Sequence[float],
    top_p: Sequence[float],
    seeds: Sequence[int],
    positions: Sequence[int],
    backend: Backend = "auto",
) -> tuple[list[int], list[float]]:
    """`sample` with one copy to the device and one back; it waits for the second alone."""
    integers = torch.tensor([*seeds, *positions], dtype=torch.int64)
    floats = torch.tensor([*temperature, *top_p], dtype=torch.float32)
    arguments = torch.cat((integers, floats.view(torch.int64))).to(logits.device, non_blocking=True)
    seed, position, bits = arguments.tensor_split(3)
    heat, mass = bits.view(torch.float32).tensor_split(2)
    ids, logprobs = _sample(logits, heat, mass, seed, position, backend)
    drawn, logs = torch.stack((ids.double(), logprobs.double())).tolist()  # ids are exact in fp64
    for row, log in enumerate(logs):
        if math.isnan(log):
            raise _refusal(row, temperature[row], top_p[row])
    return [int(token) for token in drawn], logs


def _sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `sample`, but rows that cannot be sampled get a log-prob of NaN: finding them out means waiting."""
    _check(logits, temperature, top_p, seeds, positions)
    if backend == "auto":
        backend = _best(logits.device)
    if backend == "reference":
        return sample_reference(logits, temperature, top_p, seeds, positions)
    if backend == "triton":
        if (reason := triton_off_reason()) is not None:
            raise ValueError(f"backend triton is off: {reason}")
        if logits.device.type != "cuda":
            raise ValueError(f"backend triton runs on a GPU; logits are on {logits.device}")
        from negotiator_kernels import triton_sampling

        return triton_sampling.sample(logits, temperature, top_p, seeds, positions)
    if backend != "native":
        raise ValueError(f"backend must be auto, reference, native or triton, not {backend!r}")
    if (reason := native_off_reason()) is not None:
        raise ValueError(f"backend native is off: {reason}")
    if logits.device.type != "cpu":
        raise ValueError(f"backend native runs on the CPU; logits are on {logits.device}")
    ids, logprobs = torch.ops.negotiator_kernels.sample(logits, temperature, top_p, seeds, positions)
    return ids, logprobs


def _best(device: torch.device) -> Backend:
    if device.type == "cpu" and native_off_reason() is None:
        return "native"
    if device.type == "cuda" and triton_off_reason() is None:
        return "triton"
    return "reference"


def _refusal(row: int, temperature: float, top_p: float) -> ValueError:
    return ValueError(
        f"row {row} cannot be sampled: temperature {temperature} must be at least 0, top_p {top_p} in (0, 1], and its "
        "logits finite or -inf, not all -inf"
    )


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `sample` computes, by sorting, in plain torch. Rows that cannot be sampled get a log-prob of NaN."""
    greedy = temperature == 0
    factor = torch.where(greedy, 1.0, temperature.double().reciprocal())[:, None]
    scaled = logits.double()
    scaled = (scaled - scaled.amax(-1, keepdim=True)) * factor
    weight = scaled.exp()  # [B, V], the largest is 1
    total = weight.sum(-1, keepdim=True)

    order = logits.sort(dim=-1, descending=True, stable=True).indices
    sorted_weight = weight.gather(-1, order)
    outranked_by = sorted_weight.cumsum(-1) - sorted_weight  # mass of the tokens ranked above
    in_nucleus = torch.empty_like(weight, dtype=torch.bool)
    in_nucleus.scatter_(-1, order, outranked_by < top_p.double()[:, None] * total)

    cumulative = torch.where(in_nucleus, weight, 0.0).cumsum(-1)
    target = uniform(seeds, positions)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True).clamp_(max=logits.shape[1] - 1)[:, 0]
    ids = torch.where(greedy, order[:, 0], drawn)
    logprobs = (scaled.gather(-1, ids[:, None]) - total.log())[:, 0]
    valid = (temperature >= 0) & (top_p > 0) & (top_p <= 1)
    return ids, torch.where(valid, logprobs, torch.nan).float()


def uniform(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:  # [B] int64, [B] int64 -> [B] fp64
    """Numbers in [0, 1) of 53 bits, a hash of seed and position: the same on every device and backend."""
    bits = _mix(_mix(seeds + _GOLDEN) + (positions + 1) * _GOLDEN)
    return _shift(bits, 11).double() * 2.0**-53


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 / golden ratio, as a signed integer


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of SplitMix64, in integers that wrap."""
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros; torch's own fills with the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _check(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be [B, V] fp32, not {logits.dtype} {tuple(logits.shape)}")
    for name, row, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_p", top_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
    ):
        if row.shape != logits.shape[:1] or row.dtype != dtype or row.device != logits.device:
            raise ValueError(
                f"{name} must be [{logits.shape[0]}] {dtype} on {logits.device}, "
                f"not {list(row.shape)} {row.dtype} on {row.device}"
            )
