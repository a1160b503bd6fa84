"""Native norms, rotations and gates against transformers' own, which compute in fp64 here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from negotiator.native_layers import add_embedding_gradients_in_place, use_native_layers
from negotiator_kernels.availability import native_off_reason
from negotiator_kernels.layers import rms_norm, rotary, swiglu

VOCABULARY, PADDING = 61, 3
NATIVE = "layers with native kernels"

assert native_off_reason() is None  # loads the operators


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """What it returns and the gradients of its inputs, given a made-up one of the former."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, noise(*out.shape, seed=1).to(dtype))]


def assert_close(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance * want.abs().max().item())


def plain_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """LlamaRMSNorm rounds to fp32 inside; this is its formula."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


@pytest.mark.parametrize("rows, width", [(1, 3), (5, 37), (97, 576)])  # less than a vector, a rest, several blocks
def test_norms(rows: int, width: int) -> None:
    x = noise(1, rows, width) * torch.logspace(-3, 2, rows)[:, None]  # some as small as epsilon's root
    weight = noise(width, seed=2) + 0.5
    wanted = results(lambda x, w: plain_norm(x, w, 1e-5), [x, weight], torch.float64)
    found = results(lambda x, w: rms_norm(x, w, 1e-5), [x, weight], torch.float32)
    for name, got, want in zip(("out", "dx", "dweight"), found, wanted, strict=True):
        scale = want.abs().amax(-1, keepdim=True)  # of each row its own
        assert ((got.double() - want).abs() <= 1e-6 * scale).all(), name
    theirs = LlamaRMSNorm(width, 1e-5)
    theirs.weight.data = weight
    assert_close([theirs(x)], [wanted[0]], 1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 2403)])
def test_gates(shape: tuple[int, ...]) -> None:
    gate, up = 4 * noise(*shape), noise(*shape, seed=2)
    wanted = results(lambda gate, up: F.silu(gate) * up, [gate, up], torch.float64)
    assert_close(results(swiglu, [gate, up], torch.float32), wanted, 5e-7)


def test_gates_far_from_zero() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4])
    ones = torch.ones_like(gate)
    out, dgate, _ = results(swiglu, [gate, ones], torch.float32)
    torch.testing.assert_close(out, torch.tensor([0.0, 0, 0, 0, 88, 1e4]), rtol=1e-6, atol=1e-6)
    slope = torch.tensor([0.0, 0, 0, 0.5, 1, 1])
    torch.testing.assert_close(dgate, slope * noise(6, seed=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batch, of_angles, dim", [(2, 1, 10), (2, 2, 32), (1, 1, 64)])
def test_rotations(batch: int, of_angles: int, dim: int) -> None:
    """With halves of cos and sin that differ, unlike a real embedding's, so that none can be taken for the other."""
    q, k = noise(batch, 3, 41, dim), noise(batch, 1, 41, dim, seed=2)
    cos, sin = noise(2, of_angles, 41, dim, seed=3)

    def both(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: torch.cat(rotate(q, k, cos.to(q.dtype), sin.to(q.dtype)), dim=1)

    wanted = results(both(apply_rotary_pos_emb), [q, k], torch.float64)
    assert_close(results(both(rotary), [q, k], torch.float32), wanted, 5e-7)


def test_operands_may_lie_anywhere_in_memory() -> None:
    x, gate, up = noise(2, 37, 5).mT, noise(8, 5).T, noise(5, 8, seed=1)
    weight = noise(37)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm(x.contiguous(), weight, 1e-5), rtol=0, atol=0)
    torch.testing.assert_close(swiglu(gate, up), swiglu(gate.contiguous(), up), rtol=0, atol=0)
    x.requires_grad_()
    rms_norm(x, weight, 1e-5).sum().backward()  # whose gradient is one number, expanded


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs = [noise(200, 64), noise(64, seed=2)]
    threads = torch.get_num_threads()
    try:
        alone, together = [], []
        for count, found in ((1, alone), (2, together)):
            torch.set_num_threads(count)
            found += results(lambda x, w: rms_norm(x, w, 1e-5), inputs, torch.float32)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, alone, together))


def test_operators_check_their_arguments() -> None:
    ops, x, weight, cos = torch.ops.negotiator_kernels, noise(4, 8), noise(8), noise(4, 8)
    heads = noise(4, 2, 8)
    wrong: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (ops.rms_norm, (x, noise(4), 1e-5)),
        (ops.rms_norm, (x.double(), weight.double(), 1e-5)),
        (ops.rms_norm, (x.T, noise(4), 1e-5)),
        (ops.rms_norm_backward, (noise(4, 9), x, weight, noise(4))),
        (ops.rms_norm_backward, (x, x, weight, noise(3))),
        (ops.swiglu, (x, noise(8, 4))),
        (ops.swiglu_backward, (noise(4, 4), x, x)),
        (ops.rotate_heads, (noise(4, 2, 7), noise(4, 7), noise(4, 7), False)),
        (ops.rotate_heads, (heads, noise(3, 8), noise(3, 8), False)),
        (ops.rotate_heads, (heads, cos, noise(4, 4), False)),
    ]
    for operator, arguments in wrong:
        with pytest.raises(RuntimeError, match=r"must|does not"):
            operator(*arguments)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "pad_token_id": PADDING,
    "initializer_range": 0.2,
}


def models() -> Iterator[tuple[PreTrainedModel, int]]:
    """And how many norms they have."""
    torch.manual_seed(0)
    yield LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval(), 5
    yield LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval(), 5
    yield Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "pad_token_id": None}, tie_word_embeddings=True)).eval(), 5
    yield Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval(), 9


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Of two micro-batches."""
    for half in ids:
        model(half[None], labels=half[None]).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("number", range(4))
def test_a_whole_model_learns_what_it_did(number: int) -> None:
    model, norms = list(models())[number]
    exact, names = copy.deepcopy(model).double(), model.state_dict().keys()
    assert use_native_layers(model, torch.float32) == f"{NATIVE} ({norms} norms, 2 rotations, 2 gates)"
    add_embedding_gradients_in_place(model)
    assert model.state_dict().keys() == names
    ids = torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(0))
    ids[:, 5] = PADDING  # from whose embedding transformers learns nothing
    model = copy.deepcopy(model)  # which has to have, and to train, its own
    found, wanted = gradients(model, ids), gradients(exact, ids)
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (found[name].double() - want).norm() <= 1e-5 * want.norm(), name


class OffsetRMSNorm(LlamaRMSNorm):
    """As Gemma has it, but under the names of Llama's."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) / self.weight * (1 + self.weight)


def test_only_what_computes_the_same_is_replaced() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu"))
    model.model.norm = OffsetRMSNorm(40)
    assert use_native_layers(model, torch.float32) == f"{NATIVE} (4 norms, 2 rotations, 0 gates)"
    assert modeling_llama.apply_rotary_pos_emb is apply_rotary_pos_emb  # other models have it from there


def test_another_kind_of_rotation_is_left_alone() -> None:
    """Of neighbours instead of halves."""
    model = CohereForCausalLM(CohereConfig(**SIZES, eos_token_id=1, bos_token_id=1))
    assert use_native_layers(model, torch.float32) == f"{NATIVE} (0 norms, 0 rotations, 2 gates)"


def test_other_precisions_are_left_alone() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert "the model in bfloat16" in use_native_layers(model, torch.bfloat16)
    assert all("forward" not in module.__dict__ for module in model.modules())
