"""Who is measured: each provider turns a problem into its loss and both gradients.

`ours`: every backend of `negotiator.loss.grpo_loss`. `rival`: a masked GRPO loss as shipped or as anybody would write
it. `compacted`: the same, given the trained rows only, which nobody ships. `cross-entropy`: not a GRPO loss at all; it
is handed the trained rows, compacted before the clock starts, and returns no log-probs, all of which favours it.

Shapes: N tokens, M of them trained, D hidden size, V vocabulary, B sequences of T tokens.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import shutil
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.problem import CLIP, Answer, Problem, dapo_loss
from negotiator.loss import Backend, grpo_loss, off_reason

NATIVE_CE = "native-ce"  # begins the names of PyTorch's own
Kind = Literal["ours", "rival", "compacted", "cross-entropy"]


class Provider(NamedTuple):
    name: str
    kind: Kind
    run: Callable[[Problem], Answer]
    off_reason: Callable[[torch.device], str | None]  # None where it runs


def providers() -> tuple[Provider, ...]:
    ours = [name for name in get_args(Backend) if name not in ("auto", "reference")]  # the oracle holds all logits
    return (
        *(Provider(b, "ours", functools.partial(_ours, b), functools.partial(_backend_off, b)) for b in ours),
        Provider("plain", "rival", _plain, _never_off),
        Provider("plain-compacted", "compacted", _plain_compacted, _never_off),
        Provider("compiled", "rival", _compiled, _compiler_off),
        Provider("liger-grpo", "rival", _liger_grpo, functools.partial(_package_off, "liger_kernel", False)),
        Provider("trl", "rival", _trl, functools.partial(_package_off, "trl", False)),
        Provider(NATIVE_CE, "cross-entropy", _native_ce, _native_ce_off),
        Provider(f"{NATIVE_CE}-chunked", "cross-entropy", _native_ce_chunked, _native_ce_off),
        Provider("liger-flce", "cross-entropy", _liger_flce, functools.partial(_package_off, "liger_kernel", True)),
        Provider("cce", "cross-entropy", _cce, functools.partial(_package_off, "cut_cross_entropy", True)),
        Provider("quack", "cross-entropy", _quack, functools.partial(_package_off, "quack", True)),
    )


def _answer(loss: Tensor, logprobs: Tensor | None, hidden: Tensor, weight: Tensor) -> Answer:
    return Answer(loss.detach(), logprobs, *torch.autograd.grad(loss, (hidden, weight)))


def _never_off(device: torch.device) -> None:
    return None


def _package_off(module: str, needs_cuda: bool, device: torch.device) -> str | None:
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    return f"{module} needs CUDA for it" if needs_cuda and device.type != "cuda" else None


# --- ours -------------------------------------------------------------------------------------------------------------


def _ours(backend: Backend, problem: Problem) -> Answer:
    result = grpo_loss(
        problem.hidden,
        problem.weight,
        problem.targets,
        problem.advantages,
        problem.mask,
        old_logprobs=problem.old_logprobs,
        clip_low=CLIP,
        clip_high=CLIP,
        backend=backend,
    )
    return _answer(result.loss, result.logprobs[problem.trained], problem.hidden, problem.weight)


def _backend_off(backend: Backend, device: torch.device) -> str | None:
    return off_reason(backend, device, torch.bfloat16)


# --- masked GRPO losses of others -------------------------------------------------------------------------------------


def plain_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and log-probs [N] with logits in the model's dtype and the softmax in fp32, over all rows."""
    logits = hidden @ weight.T
    logprobs = torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).squeeze(1)
    return dapo_loss(logprobs, old, advantages, mask), logprobs


def _arguments(problem: Problem) -> tuple[Tensor, ...]:
    p = problem
    return p.hidden, p.weight, p.targets, p.old_logprobs, p.advantages, p.mask


def _plain(problem: Problem) -> Answer:
    loss, logprobs = plain_loss(*_arguments(problem))
    return _answer(loss, logprobs.detach()[problem.trained], problem.hidden, problem.weight)


def _plain_compacted(problem: Problem) -> Answer:
    hidden, weight, *rows = _arguments(problem)
    loss, logprobs = plain_loss(hidden[problem.mask], weight, *(x[problem.mask] for x in rows))
    return _answer(loss, logprobs.detach(), hidden, weight)


@functools.cache
def _compiled_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(plain_loss, dynamic=True)  # the number of tokens is another one every step


def _compiled(problem: Problem) -> Answer:
    loss, logprobs = _compiled_loss()(*_arguments(problem))
    return _answer(loss, logprobs.detach()[problem.trained], problem.hidden, problem.weight)


def _compiler_off(device: torch.device) -> str | None:
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "torch.compile needs a C++ compiler on the CPU"
    return None


def _liger_grpo(problem: Problem) -> Answer:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    b = problem.shape.sequences
    module = LigerFusedLinearGRPOLoss(
        beta=0.0,
        use_ref_model=False,
        epsilon_low=CLIP,
        epsilon_high=CLIP,
        loss_type="dapo",
        compiled=problem.hidden.is_cuda,  # its default; on the CPU compiling is slower
    )
    loss, _ = module(
        problem.hidden.view(b, -1, problem.shape.hidden),
        problem.weight,
        problem.targets.view(b, -1),
        problem.mask.view(b, -1).float(),
        problem.advantages.view(b, -1)[:, 0],
        old_per_token_logps=problem.old_logprobs.view(b, -1),
    )
    return _answer(loss, None, problem.hidden, problem.weight)


def _trl(problem: Problem) -> Answer:
    """As its GRPOTrainer calls it: the chunk size and outputs of there, rows compacted on CUDA only."""
    from trl.kernels import ChunkedLogProbFunction

    hidden, weight, *rows = _arguments(problem)
    keep = problem.mask if hidden.is_cuda else slice(None)
    targets, old, advantages, mask = (x[keep] for x in rows)
    outputs = ChunkedLogProbFunction.apply(
        hidden[keep], weight, None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy")
    )
    logprobs = outputs[0]
    loss = dapo_loss(logprobs, old, advantages, mask)
    return _answer(loss, logprobs.detach()[mask], hidden, weight)


# --- cross-entropies over the trained rows ----------------------------------------------------------------------------


def _native_ce(problem: Problem) -> Answer:
    """`F.linear_cross_entropy` as it comes: all logits at once."""
    x, w = problem.trained_hidden, problem.weight
    return _answer(F.linear_cross_entropy(x, w, problem.targets[problem.trained]), None, x, w)


def _native_ce_chunked(problem: Problem) -> Answer:
    """With the options that were quickest: on the CPU its own choice of chunk, D / V of the rows, took several times as
    long, and other policies multiply bf16 where this one multiplies fp32.
    """
    x, w = problem.trained_hidden, problem.weight
    options = torch.nn.LinearCrossEntropyOptions()
    if not x.is_cuda and x.dtype == torch.bfloat16:
        options = torch.nn.LinearCrossEntropyOptions(
            acc_policy="accurate", acc_dtype=torch.float32, chunking_method=None, batch_chunk_size=1024
        )
    elif not x.is_cuda:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy="compact", chunking_method=None, batch_chunk_size=512)
    loss = F.linear_cross_entropy(x, w, problem.targets[problem.trained], options=options)
    return _answer(loss, None, x, w)


def _native_ce_off(device: torch.device) -> str | None:
    has = hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if has else f"torch {torch.__version__} has no F.linear_cross_entropy with chunks"


def _liger_flce(problem: Problem) -> Answer:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    x, w = problem.trained_hidden, problem.weight
    return _answer(liger_fused_linear_cross_entropy(x, w, problem.targets[problem.trained]), None, x, w)


def _cce(problem: Problem) -> Answer:
    from cut_cross_entropy import linear_cross_entropy

    x, w = problem.trained_hidden, problem.weight
    return _answer(linear_cross_entropy(x, w, problem.targets[problem.trained]), None, x, w)


def _quack(problem: Problem) -> Answer:
    """It wants a multiple of 8 rows: the ones added are ignored."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    x, w, missing = problem.trained_hidden, problem.weight, -problem.shape.trained % 8
    rows, targets = F.pad(x, (0, 0, 0, missing)), F.pad(problem.targets[problem.trained], (0, missing), value=-100)
    return _answer(chunked_linear_cross_entropy(rows, w, targets, ignore_index=-100), None, x, w)


# --- the floor --------------------------------------------------------------------------------------------------------


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has units for bf16; where it has none, products of bf16 matrices are far slower than of fp32."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def bare_gemms(problem: Problem, dtype: torch.dtype) -> Callable[[], None]:
    """The three matrix products over the trained rows that no loss with gradients can do without, and nothing else."""
    x, w = (t.detach().to(dtype) for t in (problem.trained_hidden, problem.weight))

    def buffers() -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty(len(x), len(w)), torch.empty_like(x), torch.empty_like(w)

    # Fresh memory costs a CPU page faults, which are no part of a product. A GPU has its own cache of memory, and none
    # to spare.
    held = None if x.is_cuda else tuple(t.zero_() for t in buffers())

    def run() -> None:
        logits, d_hidden, d_weight = held or buffers()
        torch.mm(x, w.T, out=logits)
        torch.mm(logits, w, out=d_hidden)
        torch.mm(logits.T, x, out=d_weight)

    return run


def versions() -> dict[str, str]:
    """Of the packages that are compared."""
    names = ("torch", "triton", "liger-kernel", "trl", "cut-cross-entropy", "quack-kernels")
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    return {name: torch.__version__ if name == "torch" else found[name] for name in names if name in found}
