"""The forward half of the fused loss: exponentials of logits relative to an anchor, and their sums, in one pass.

With the anchor of a row near its log-sum-exp, no row maximum has to be known before the first exponential, so tiles of
the vocabulary do not depend on each other and no logit is looked at twice. The target's own logit is such an anchor:
exp(z - z_target) sums to 1 / p(target), which overflows only where the target has a probability below e^-60 or so.

Shapes: C rows, D hidden size, V vocabulary, T columns of a tile of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Logits held in fp32 between the product and their exponentials: a part of the last-level cache of a CPU; on a GPU
# enough for an efficient product.
TILE_BYTES = {"cpu": 4 << 20, "cuda": 192 << 20}
# Tiles start at a multiple of it: what is aligned for a whole row is aligned for its tiles.
TILE_STEP = 256


def tile_exponentials(
    logits: Tensor,  # [C, T] in the dtype of `anchors`; may be overwritten
    anchors: Tensor,  # [C]
    temperature: float,
    values: Tensor | None,  # [C, T] filled with exp(logits / temperature - anchor), unless only the sums are wanted
    sums: Tensor,  # [C] added to: the sum of the unrounded values
    moments: Tensor,  # [C] added to: the sum of unrounded value times logarithm
) -> None:
    """What happens to one tile of logits, in plain torch."""
    if temperature != 1:
        logits.div_(temperature)
    logits.sub_(anchors[:, None])
    exact = logits.exp()
    sums += exact.sum(dim=1)
    moments += torch.linalg.vecdot(exact, logits)
    if values is not None:
        values.copy_(exact)


def exponentials(
    hidden: Tensor,  # [C, D]
    weight: Tensor,  # [V, D], dtype of `hidden`
    anchors: Tensor,  # [C] fp32, fp64 for fp64 operands
    temperature: float,
    out: Tensor | None,  # [C, V] filled with exp(hidden . weight / temperature - anchor); last dimension contiguous
    of_tile: Callable[[Tensor, Tensor, float, Tensor | None, Tensor, Tensor], None] = tile_exponentials,
) -> tuple[Tensor, Tensor]:  # [C], [C] in the dtype of `anchors`
    """Fills `out`, if any; returns each row's sum and its sum of value times logarithm, both before `out`'s rounding.

    Logits are in the dtype of `anchors`. An overflow shows as an infinite sum.
    """
    sums, moments = torch.zeros_like(anchors), torch.zeros_like(anchors)
    for tile in _tiles(hidden.shape[0], weight.shape[0], hidden.device):
        logits = matmul(hidden, weight[tile].T, anchors.dtype)
        of_tile(logits, anchors, temperature, None if out is None else out[:, tile], sums, moments)
    return sums, moments


def entropy_gradient_(values: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """values [C, V] *= alpha [C] + beta [C] log(values), in place; a value of 0 stays 0.

    The entropy's share of a logit's gradient is proportional to p log p, which an exponential alone does not give.
    """
    for tile in _tiles(values.shape[0], values.shape[1], values.device):
        wide = values[:, tile].to(alpha.dtype)
        values[:, tile] = alpha[:, None] * wide + beta[:, None] * torch.special.xlogy(wide, wide)


def _tiles(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of the columns of [rows, columns], each of about TILE_BYTES of fp32."""
    limit = TILE_BYTES.get(device.type, TILE_BYTES["cuda"])
    width = max(1, limit // (4 * rows * TILE_STEP)) * TILE_STEP if rows else columns
    return (slice(start, min(start + width, columns)) for start in range(0, columns, width))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`, accumulated in it. Only CUDA multiplies narrower operands than it accumulates in."""
    if a.dtype == dtype:
        return a @ b
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else a.to(dtype) @ b.to(dtype)
