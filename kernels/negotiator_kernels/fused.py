"""The GRPO loss without ever holding all logits: a bounded chunk of rows at a time, whatever makes the exponentials.

A chunk's exponentials are relative to the logit of the row's target, so that they need no row maximum (see
`exponentials`), and they are all that the gradient needs: with S their sum over a row, d log p / d logits is
[j = target] - values / S. Correcting one entry a row turns them into the gradient of the logits up to a factor per row,
and that factor moves into the small matrices: dX = factor (values W), dW = values^T (factor x).

Gradients are made while a chunk is there (6DV multiplications a row; computing the logits again for the backward pass
would be 8DV) and only scaled by the incoming gradient in backward. A row whose gradient is known to be zero (advantage
0, clipped, masked by the importance correction) takes no part in the two backward matmuls.

gspo's ratio needs the log-probs of a whole sequence before the first gradient, so it runs a forward pass of its own
first (8DV), except on-policy, where the ratio is 1 whatever they are.

Logits, sums and both gradient sums are fp32 (fp64 for fp64 inputs) whatever the inputs are. bf16 operands stay bf16
where the device multiplies them with fp32 accumulation, as do the exponentials then; elsewhere they are widened.
What rounding takes from the target's entry of a row is given back in fp32: that entry holds at least half of the
row's squared norm, so at most half of the roundings' error remains.

Shapes: M trained rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from negotiator_kernels.exponentials import entropy_gradient_, exponentials, matmul
from negotiator_kernels.reference import BackendResult, LossSpec, Rows, objective

# Exponentials held at once. Every chunk reads and writes the whole weight gradient, so small ones are slow.
CHUNK_BYTES = {"cpu": 192 << 20, "cuda": 1 << 30}
# A row whose sum reaches this is computed again with a better anchor; what is below leaves products room to be finite.
LARGEST_SUM = 1e26
REPAIR_ROWS = 64


def objective_gradient(logprobs: Tensor, entropy: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
    """[2, M]: d loss / d log-prob and d loss / d entropy."""
    with torch.enable_grad():
        leaves = logprobs.detach().requires_grad_(), entropy.detach().requires_grad_()
        return torch.stack(torch.autograd.grad(objective(*leaves, rows, spec), leaves, materialize_grads=True))


def add_product(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a @ b in `dtype`, summed up in it, in the memory of `total`; None stands for 0 but is cheaper."""
    if total is None:
        return matmul(a, b, dtype)
    if a.dtype == dtype:
        return torch.addmm(total, a, b, out=total)  # not addmm_, which PyTorch's FLOP counter does not see
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


class Kernels(NamedTuple):
    """What differs between backends; the defaults are plain torch. Shapes and meaning: see the defaults."""

    exponentials: Callable[[Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]] = exponentials
    entropy_gradient_: Callable[[Tensor, Tensor, Tensor], None] = entropy_gradient_
    objective_gradient: Callable[[Tensor, Tensor, Rows, LossSpec], Tensor] = objective_gradient
    add_product: Callable[[Tensor | None, Tensor, Tensor, torch.dtype], Tensor] = add_product
    bf16_inputs: bool = False  # hidden and weight are taken in bf16
    bf16_values: bool = False  # and exponentials kept and multiplied in it; both True is what tensor cores are for


TORCH = Kernels()


class _Chunk(NamedTuple):
    at: slice  # its place in [M]
    hidden: Tensor  # [C, D], an operand
    values: Tensor | None  # [C, V] exponentials in memory that the next chunk uses again, None if nobody needs them
    sums: Tensor  # [C]
    target_values: Tensor  # [C] the targets' exponentials, unrounded: 1, or next to 0 in a row with another anchor
    logprobs: Tensor  # [C]
    entropy: Tensor  # [C] nats


def _operand(values: Tensor, kernels: Kernels) -> Tensor:
    """`values` in the dtype they are multiplied in, with contiguous rows."""
    if values.stride(-1) != 1:
        values = values.contiguous()
    as_they_are = values.dtype == torch.bfloat16 and kernels.bf16_inputs
    return values if as_they_are else values.to(torch.promote_types(values.dtype, torch.float32))


def _rows_of(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for exponentials [rows, V], each row at a multiple of 64 bytes: GPUs move 16 bytes at a time."""
    step = 64 // dtype.itemsize
    return torch.empty(rows, -(-vocabulary // step) * step, dtype=dtype, device=device)[:, :vocabulary]


def _chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, kernels: Kernels, keep_values: bool
) -> Iterator[_Chunk]:
    """`weight` is an operand already."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    kept = (weight.shape[0], weight.dtype if kernels.bf16_values else dtype, weight.device)
    total, limit = hidden.shape[0], CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    count = -(-total // max(1, limit // (kept[0] * kept[1].itemsize)))
    buffer = _rows_of(-(-total // max(count, 1)), *kept) if keep_values else None
    for i in range(count):
        at = slice(total * i // count, total * (i + 1) // count)
        x, y = _operand(hidden[at], kernels), targets[at]
        values = None if buffer is None else buffer[: len(x)]
        anchors = torch.linalg.vecdot(x.to(dtype), weight[y].to(dtype)) / temperature
        sums, moments = kernels.exponentials(x, weight, anchors, temperature, values)
        target_logs = torch.zeros_like(anchors)
        unsafe = (~(sums < LARGEST_SUM)).nonzero().squeeze(1)
        for index in unsafe.split(REPAIR_ROWS) if len(unsafe) else ():
            log_sums = torch.logsumexp(matmul(x[index], weight.T, dtype) / temperature, dim=1)
            better = None if values is None else _rows_of(len(index), *kept)
            sums[index], moments[index] = kernels.exponentials(x[index], weight, log_sums, temperature, better)
            if values is not None and better is not None:
                values[index] = better
            target_logs[index] = anchors[index] - log_sums
        log_sums = sums.log()
        yield _Chunk(at, x, values, sums, target_logs.exp(), target_logs - log_sums, log_sums - moments / sums)


def _without_idle_rows(chunk: _Chunk, active: Tensor) -> tuple[_Chunk, Tensor]:
    """The rows of the chunk where `active` [C] is True, and which ones these are, in any order.

    Exponentials are large, so only as many are moved as fill the gaps, within the chunk's own memory.
    """
    assert chunk.values is not None
    kept = torch.arange(int(active.sum()), device=active.device)  # waits for the device, once a chunk
    if len(kept) == len(active):
        return chunk, kept
    gaps = (~active[: len(kept)]).nonzero().squeeze(1)
    movers = active[len(kept) :].nonzero().squeeze(1) + len(kept)
    kept[gaps] = movers
    chunk.values[gaps] = chunk.values[movers]
    values = chunk.values[: len(kept)]
    rest = (x[kept] for x in (chunk.sums, chunk.target_values, chunk.logprobs, chunk.entropy))
    return _Chunk(chunk.at, chunk.hidden[kept], values, *rest), kept


class _LogitGradient(NamedTuple):
    values: Tensor  # [C, V], of which factor * values is the gradient
    factor: Tensor  # [C]
    at_target: Tensor  # [C] the targets' values, unrounded


def _logit_gradient_(
    chunk: _Chunk, targets: Tensor, gradient: Tensor, spec: LossSpec, kernels: Kernels
) -> _LogitGradient:
    """Turn the exponentials into the gradient of the logits, in place. `gradient`: see `objective_gradient`.

    With p = values / S: d log p_y / d z_j = [j = y] - p_j and d H / d z_j = -p_j (log p_j + H).
    """
    assert chunk.values is not None
    d_logprobs, d_entropy = gradient
    values, at_target = chunk.values, chunk.target_values
    if spec.entropy_coef == 0:
        at_target, factor = at_target - chunk.sums, -d_logprobs / chunk.sums
    else:
        alpha = d_logprobs + d_entropy * (chunk.entropy - chunk.sums.log())
        kernels.entropy_gradient_(values, alpha, d_entropy)
        at_target = alpha * at_target - d_logprobs * chunk.sums  # beta adds nothing: it is 1 or next to 0
        factor = -1 / chunk.sums
    values.scatter_(1, targets[:, None], at_target[:, None].to(values.dtype))
    return _LogitGradient(values, factor / spec.temperature, at_target)


def _hidden_gradient(
    of_logits: _LogitGradient, targets: Tensor, weight: Tensor, dtype: torch.dtype, kernels: Kernels
) -> Tensor:
    """[C, D] in `dtype`. The target's value, often as large as all others together, enters unrounded."""
    product = kernels.add_product(None, of_logits.values, weight, dtype)
    if of_logits.values.dtype != dtype:
        lost = of_logits.at_target[:, None] - of_logits.values.gather(1, targets[:, None])
        product.addcmul_(lost, weight[targets].to(dtype))
    return product.mul_(of_logits.factor[:, None])


def _add_weight_gradient(
    total: Tensor | None,
    of_logits: _LogitGradient,
    targets: Tensor,
    hidden: Tensor,
    dtype: torch.dtype,
    kernels: Kernels,
) -> Tensor:
    """`total` [V, D] in `dtype` and this chunk's share. What belongs to the targets enters unrounded."""
    exact = hidden * of_logits.factor[:, None]  # in `dtype`, which the factor has
    scaled = exact.to(of_logits.values.dtype)
    total = kernels.add_product(total, of_logits.values.T, scaled, dtype)
    if scaled.dtype != dtype:
        rounded = of_logits.values.gather(1, targets[:, None]).to(dtype)
        lost = of_logits.at_target[:, None] * exact - rounded * scaled
        total.index_put_((targets,), lost, accumulate=True)
    return total


def _sequence_gradient(hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec, kernels: Kernels) -> Tensor:
    """`objective_gradient` of gspo over all rows."""
    weighted = spec.importance != "none" and rows.sampling_logprobs is not None
    if rows.old_logprobs is None and not weighted and spec.beta == 0:
        unused = torch.zeros_like(rows.advantages)
        return objective_gradient(unused, unused, rows, spec)
    logprobs, entropy = token_logprobs(hidden, weight, rows.targets, spec.temperature, kernels)
    return objective_gradient(logprobs, entropy, rows, spec)


@torch.no_grad()
def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """Log-probs [M] of `targets` and entropies [M] under softmax(hidden . weight / temperature); forward only."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False):
        w = _operand(weight, kernels)
        for chunk in _chunks(hidden, w, targets, temperature, kernels, keep_values=False):
            logprobs[chunk.at], entropy[chunk.at] = chunk.logprobs, chunk.entropy
    return logprobs, entropy


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec, kernels: Kernels
    ) -> tuple[Any, ...]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = (torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(2))
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        d_weight: Tensor | None = None
        skipped_rows = 0

        with torch.autocast(hidden.device.type, enabled=False):
            w = _operand(weight, kernels)
            by_sequence = spec.loss_type == "gspo"
            of_sequences = _sequence_gradient(hidden, w, rows, spec, kernels) if by_sequence else None
            for chunk in _chunks(hidden, w, rows.targets, spec.temperature, kernels, keep_values=True):
                at = chunk.at
                logprobs[at], entropy[at] = chunk.logprobs, chunk.entropy
                if of_sequences is None:
                    gradient = kernels.objective_gradient(chunk.logprobs, chunk.entropy, rows.slice(at), spec)
                else:
                    gradient = of_sequences[:, at]

                chunk, kept = _without_idle_rows(chunk, gradient.any(dim=0))
                skipped_rows += at.stop - at.start - len(kept)
                index, gradient = at.start + kept, gradient[:, kept]
                y = rows.targets[index]
                of_logits = _logit_gradient_(chunk, y, gradient, spec, kernels)
                if d_hidden is not None:
                    d_hidden[index] = _hidden_gradient(of_logits, y, w, dtype, kernels)
                if need_weight:
                    d_weight = _add_weight_gradient(d_weight, of_logits, y, chunk.hidden, dtype, kernels)

        if need_weight and d_weight is None:
            d_weight = torch.zeros_like(weight)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.input_dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return objective(logprobs, entropy, rows, spec), logprobs, entropy, skipped_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        # What a backward pass through a graph that is freed leaves behind belongs to nobody else.
        keep = torch._C._autograd._get_current_graph_task_keep_graph()

        def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            if d_loss.device.type == "cpu" and d_loss == 1:  # as it mostly is; on a GPU asking would cost a wait
                return gradient.to(dtype, copy=keep)
            if keep or gradient.dtype != dtype:
                return torch.mul(gradient, d_loss, out=torch.empty_like(gradient, dtype=dtype))
            return gradient.mul_(d_loss)

        d_hidden, d_weight = (scaled(g, t) for g, t in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True))
        return d_hidden, d_weight, None, None, None


def grpo_loss(hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec, kernels: Kernels) -> BackendResult:
    """The fused backends."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return BackendResult(*_FusedLoss.apply(hidden, weight, rows, spec, kernels))  # type: ignore[no-untyped-call]
    logprobs, entropy = token_logprobs(hidden, weight, rows.targets, spec.temperature, kernels)
    return BackendResult(objective(logprobs, entropy, rows, spec), logprobs, entropy, skipped_rows=hidden.shape[0])
