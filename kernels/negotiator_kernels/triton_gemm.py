# mypy: disable-error-code="import-untyped, import-not-found, untyped-decorator, no-untyped-def"
"""`exponentials` as one persistent bf16 matmul for Hopper whose epilogue takes them: no logit reaches device memory.

Shapes: C rows, D hidden size, V vocabulary; tiles of ROWS x COLUMNS logits, DEPTH products of a sum at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from negotiator_kernels.triton_exponentials import LOG2_E, LOWEST

ROWS, COLUMNS, DEPTH = 128, 256, 64
# 48 KiB of operands a stage; a tile is stored in halves because 32 KiB more leave room for the fourth stage, 64 do not.
STAGES, WARPS = 4, 8
HALF = COLUMNS // 2
# Row tiles that pass by a weight tile while it is in the L2 cache: up to 4,096 rows read the weight once.
GROUP = 32


def exponentials(
    hidden: Tensor, weight: Tensor, anchors: Tensor, temperature: float, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `negotiator_kernels.exponentials`; bf16 on compute capability 9.0 or 10.0.

    Raises ValueError unless the rows of all three matrices are contiguous bf16 and start at multiples of 16 bytes.
    """
    for name, matrix in (("hidden", hidden), ("weight", weight), ("out", out)):
        if matrix is None:
            continue
        if matrix.dtype != torch.bfloat16:
            raise ValueError(f"{name} must be bf16, not {matrix.dtype}")
        if matrix.stride(1) != 1 or matrix.stride(0) % 8 or matrix.data_ptr() % 16:  # what the copy engine asks for
            raise ValueError(f"every row of {name} must be contiguous and start at a multiple of 16 bytes")
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    row_tiles, vocabulary_tiles = triton.cdiv(rows, ROWS), triton.cdiv(vocabulary, COLUMNS)
    # Added up afterwards, so that a sum does not depend on which tile is finished first.
    parts = anchors.new_empty(2, vocabulary_tiles * 2, rows)
    if rows > 0:
        grid = (min(row_tiles * vocabulary_tiles, _multiprocessors(hidden.device)),)
        _gemm_exponentials[grid](
            TensorDescriptor.from_tensor(hidden, [ROWS, DEPTH]),
            TensorDescriptor.from_tensor(weight, [COLUMNS, DEPTH]),
            anchors,
            None if out is None else TensorDescriptor.from_tensor(out, [ROWS, HALF]),
            parts,
            rows,
            vocabulary,
            1 / temperature,
            SIZE=hidden.shape[1],
            GROUP=GROUP,
            UPCAST=not hidden.is_cuda,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    sums, moments = parts.sum(dim=1)
    return sums, moments


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@triton.jit(do_not_specialize=["rows"])
def _gemm_exponentials(
    hidden,  # descriptor of [C, D] bf16
    weight,  # descriptor of [V, D] bf16
    anchors,  # [C] fp32
    values,  # descriptor of [C, V] bf16, written, None if only the sums are wanted
    parts,  # [2, halves of vocabulary tiles, C] fp32, written: sums and moments
    rows,
    vocabulary,
    inverse_temperature,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,  # for the interpreter, which multiplies bf16 wrongly
):
    ROWS: tl.constexpr = hidden.block_shape[0]
    DEPTH: tl.constexpr = hidden.block_shape[1]
    COLUMNS: tl.constexpr = weight.block_shape[0]
    HALF: tl.constexpr = COLUMNS // 2
    row_tiles, vocabulary_tiles = tl.cdiv(rows, ROWS), tl.cdiv(vocabulary, COLUMNS)
    # Flattened, so that the loads of the next tile begin before the epilogue of this one.
    for tile in tl.range(tl.program_id(0), row_tiles * vocabulary_tiles, tl.num_programs(0), flatten=True):
        row_tile, vocabulary_tile = _place(tile, row_tiles, vocabulary_tiles, GROUP)
        row, column = row_tile * ROWS, vocabulary_tile * COLUMNS
        logits = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(tl.cdiv(SIZE, DEPTH)):
            x = hidden.load([row, k * DEPTH])
            w = weight.load([column, k * DEPTH])
            if UPCAST:
                x, w = x.to(tl.float32), w.to(tl.float32)
            logits = tl.dot(x, w.T, logits)
        left, right = tl.split(tl.permute(tl.reshape(logits, (ROWS, 2, HALF)), (0, 2, 1)))
        part = parts + vocabulary_tile * 2 * rows
        moments = vocabulary_tiles * 2 * rows
        _epilogue(left, anchors, values, part, moments, row, column, rows, vocabulary, inverse_temperature)
        part += rows
        _epilogue(right, anchors, values, part, moments, row, column + HALF, rows, vocabulary, inverse_temperature)


@triton.jit
def _place(tile, row_tiles, vocabulary_tiles, GROUP: tl.constexpr):
    """Groups of up to GROUP row tiles one after the other; in a group all row tiles before the next weight tile."""
    of_group = GROUP * vocabulary_tiles
    first = tile // of_group * GROUP
    height = min(row_tiles - first, GROUP)
    return first + tile % of_group % height, tile % of_group // height


@triton.jit
def _epilogue(logits, anchors, values, part, moments, first_row, first_column, rows, vocabulary, inverse_temperature):
    """Stores the exponentials of half a tile, its sums at `part` and its moments `moments` behind them.

    The order of the memory accesses matters: because the anchors are loaded for each half and the sums are stored
    before the exponentials, the compiler has to compute the second half while the copy engine stores the first.
    """
    row = first_row + tl.arange(0, logits.shape[0])
    column = first_column + tl.arange(0, logits.shape[1])
    anchor = tl.load(anchors + row, mask=row < rows, other=0.0)
    log = logits * inverse_temperature - anchor[:, None]
    value = tl.exp2(log * LOG2_E)
    # The last tile reaches past the vocabulary, where weights read as 0 and logits with them.
    counted = tl.where(column[None, :] < vocabulary, value, 0.0)
    tl.store(part + row, tl.sum(counted, 1), mask=row < rows)
    tl.store(part + moments + row, tl.sum(counted * tl.maximum(log, LOWEST), 1), mask=row < rows)
    if values is not None:
        values.store([first_row, first_column], value.to(tl.bfloat16))
