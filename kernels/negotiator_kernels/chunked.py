"""The GRPO loss without ever holding all logits: plain PyTorch, a bounded chunk of rows at a time, on CPU and CUDA.

Gradients are made while a chunk's logits are there (6DV multiplications a row; computing the logits again for the
backward pass would be 8DV) and only scaled by the incoming gradient in backward. A row whose gradient is known to be
zero (advantage 0, clipped, masked by the importance correction) takes no part in the two backward matmuls.

gspo's ratio needs the log-probs of a whole sequence before the first gradient, so it runs a forward pass of its own
first (8DV), except on-policy, where the ratio is 1 whatever they are.

Logits, log-sum-exp and both gradient sums are fp32 (fp64 for fp64 inputs) whatever the inputs are. On the CPU the
operands are upcast; on CUDA bf16 operands go to the tensor cores with fp32 accumulation and output.

Shapes: M trained rows, D hidden size, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from negotiator_kernels.reference import BackendResult, LossSpec, Rows, objective

# Logits held at once. Every chunk reads and writes the whole weight gradient, so small ones are slow; large ones gain
# little for their memory (H100, V = 151,936, D = 4,096, bf16: 256 MiB takes 1.5 times as long as 4 GiB, 1 GiB 1.06).
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# Rows normalised at once: on the CPU a block that stays in cache between its seven element-wise passes.
BLOCK_BYTES = {"cpu": 2 << 20, "cuda": 1 << 30}


def _rows_within(limit: dict[str, int], device: torch.device, row_bytes: int) -> int:
    return max(1, limit.get(device.type, limit["cuda"]) // row_bytes)


def _operand(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in the dtype they are multiplied in: bf16 where tensor cores add it up in fp32, else `dtype`."""
    return values if values.is_cuda and values.dtype == torch.bfloat16 else values.to(dtype)


def _mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, in the dtype of `out`"""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else torch.mm(a, b, out_dtype=out.dtype, out=out)


def _add_mm_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b"""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)  # not addmm_, which PyTorch's FLOP counter does not see
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def _normalise_(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Turn logits [C, V] into log-probs in place; return those of `targets` [C] and the entropies [C]."""
    entropy = logits.new_empty(logits.shape[0])
    block_rows = _rows_within(BLOCK_BYTES, logits.device, logits.shape[1] * logits.itemsize)
    for block, out in zip(torch.split(logits, block_rows), torch.split(entropy, block_rows), strict=True):
        if temperature != 1:
            block.div_(temperature)
        block.sub_(block.amax(dim=1, keepdim=True))
        exps = block.exp()
        sums = exps.sum(dim=1)
        logs = sums.log()
        torch.sub(logs, torch.linalg.vecdot(exps, block) / sums, out=out)
        block.sub_(logs[:, None])
    return logits.gather(1, targets[:, None]).squeeze(1), entropy


def _logit_gradient_(logs: Tensor, targets: Tensor, entropy: Tensor, gradient: Tensor, with_entropy: bool) -> Tensor:
    """Turn log-probs [C, V] in place into the gradient of their logits, given `_objective_gradient` [2, C].

    With p = exp(logs): d logp_y / dz_j = [j = y] - p_j and d H / dz_j = -p_j (log p_j + H).
    """
    d_logprobs, d_entropy = gradient
    block_rows = _rows_within(BLOCK_BYTES, logs.device, logs.shape[1] * logs.itemsize)
    for start in range(0, logs.shape[0], block_rows):
        at = slice(start, start + block_rows)
        block = logs[at]
        probs = block.exp()
        if with_entropy:
            block.add_(entropy[at, None]).mul_(-d_entropy[at, None]).sub_(d_logprobs[at, None]).mul_(probs)
        else:
            torch.mul(probs, -d_logprobs[at, None], out=block)
    return logs.scatter_add_(1, targets[:, None], d_logprobs[:, None])


def _objective_gradient(logprobs: Tensor, entropy: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
    """[2, M]: d loss / d log-prob and d loss / d entropy."""
    with torch.enable_grad():
        leaves = logprobs.detach().requires_grad_(), entropy.detach().requires_grad_()
        return torch.stack(torch.autograd.grad(objective(*leaves, rows, spec), leaves, materialize_grads=True))


def _sequence_gradient(hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec) -> Tensor:
    """`_objective_gradient` of gspo over all rows."""
    weighted = spec.importance != "none" and rows.sampling_logprobs is not None
    if rows.old_logprobs is None and not weighted and spec.beta == 0:
        unused = torch.zeros_like(rows.advantages)
        return _objective_gradient(unused, unused, rows, spec)
    logprobs, entropy = token_logprobs(hidden, weight, rows.targets, spec.temperature)
    return _objective_gradient(logprobs, entropy, rows, spec)


def _normalised_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Chunk by chunk: its place in [M], its log-probs [C, V] in memory that the next one reuses, those of the targets
    [C] and the entropies [C]. `weight` is an operand already.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total, vocabulary = hidden.shape[0], weight.shape[0]
    count = -(-total // _rows_within(CHUNK_BYTES, hidden.device, vocabulary * dtype.itemsize))
    buffer = torch.empty(-(-total // max(count, 1)), vocabulary, dtype=dtype, device=hidden.device)
    for i in range(count):
        at = slice(total * i // count, total * (i + 1) // count)
        logits = _mm(_operand(hidden[at], dtype), weight.T, out=buffer[: at.stop - at.start])
        yield at, logits, *_normalise_(logits, targets[at], temperature)


@torch.no_grad()
def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs [M] of `targets` and entropies [M] under softmax(hidden . weight / temperature); forward only."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    logprobs, entropy = (torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False):
        for at, _, logp, ent in _normalised_chunks(hidden, _operand(weight, dtype), targets, temperature):
            logprobs[at], entropy[at] = logp, ent
    return logprobs, entropy


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec) -> tuple[Any, ...]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = (torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device) for _ in range(2))
        d_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if need_weight else None
        skipped_rows = 0

        with torch.autocast(hidden.device.type, enabled=False):
            w = _operand(weight, dtype)
            of_sequences = _sequence_gradient(hidden, w, rows, spec) if spec.loss_type == "gspo" else None
            for at, logs, logp, ent in _normalised_chunks(hidden, w, rows.targets, spec.temperature):
                logprobs[at], entropy[at] = logp, ent
                if of_sequences is None:
                    gradient = _objective_gradient(logp, ent, rows.slice(at), spec)
                else:
                    gradient = of_sequences[:, at]

                active = gradient.any(dim=0).nonzero().squeeze(1)  # waits for the device, once a chunk
                index = at.start + active
                if len(active) < len(logp):
                    skipped_rows += len(logp) - len(active)
                    logs, ent, gradient = logs[active], ent[active], gradient[:, active]
                gradient = gradient / spec.temperature  # the loss sees logits / temperature
                d_logits = _logit_gradient_(logs, rows.targets[index], ent, gradient, spec.entropy_coef != 0)
                d_logits = d_logits.to(w.dtype)
                if d_hidden is not None:
                    d_hidden[index] = _mm(d_logits, w, out=d_hidden.new_empty(len(index), w.shape[1]))
                if d_weight is not None:
                    _add_mm_(d_weight, d_logits.T, _operand(hidden[index], dtype))

        ctx.save_for_backward(d_hidden, d_weight)
        ctx.input_dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(logprobs, entropy)
        return objective(logprobs, entropy, rows, spec), logprobs, entropy, skipped_rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        def scaled(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            return torch.mul(gradient, d_loss, out=torch.empty_like(gradient, dtype=dtype))

        d_hidden, d_weight = (scaled(g, t) for g, t in zip(ctx.saved_tensors, ctx.input_dtypes, strict=True))
        return d_hidden, d_weight, None, None


def grpo_loss(hidden: Tensor, weight: Tensor, rows: Rows, spec: LossSpec) -> BackendResult:
    """The torch backend."""
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return BackendResult(*_ChunkedLoss.apply(hidden, weight, rows, spec))  # type: ignore[no-untyped-call]
    logprobs, entropy = token_logprobs(hidden, weight, rows.targets, spec.temperature)
    return BackendResult(objective(logprobs, entropy, rows, spec), logprobs, entropy, skipped_rows=hidden.shape[0])
