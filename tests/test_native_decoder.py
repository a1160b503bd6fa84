"""The native decoder against Hugging Face in fp64: logits and cache, in whatever pieces a sequence is computed."""

from __future__ import annotations

import faulthandler
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decoder_cases import (
    MODELS,
    VOCABULARY,
    Runner,
    build,
    errors_of_a_random_run,
    exactly,
    multiplies_bf16,
    random_ids,
    random_run,
    worst,
)
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from negotiator.engines import native_forward
from negotiator.engines.native_forward import native_forward_off_reason, pack_weights
from negotiator_kernels.decoder import DecoderWeights, decode

# Largest error of a number, in units of their size: in fp32, where Hugging Face itself has up to 1.2e-5; and where
# numbers on the border between two of bf16 go to the other side.
ROUNDING, FLIPPED = 3e-5, 0.04


@pytest.fixture(autouse=True)
def time_limit() -> Iterator[None]:
    """Native code that hangs cannot be interrupted: after two minutes the whole run ends, and shows where it was."""
    faulthandler.dump_traceback_later(120, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("name", MODELS)
def test_decoder_equals_hugging_face(name: str) -> None:
    model = build(name)
    exact = exactly(model)
    for seed in range(3):
        errors = errors_of_a_random_run(Runner(model, 700), exact, seed)
        assert max(errors.values()) < ROUNDING, errors


@pytest.mark.parametrize("name", MODELS)
def test_decoder_with_bf16_weights_equals_hugging_face(name: str) -> None:
    model = build(name, torch.bfloat16)
    errors = errors_of_a_random_run(Runner(model, 700), exactly(model), seed=0)
    assert max(errors.values()) < (FLIPPED if multiplies_bf16() else ROUNDING), errors


@pytest.mark.parametrize("name", MODELS)
def test_decoder_with_a_bf16_cache_equals_hugging_face(name: str) -> None:
    model = build(name, torch.bfloat16)
    exact, runner, tokens = exactly(model), Runner(model, 700, torch.bfloat16), random_ids(150)
    errors = errors_of_a_random_run(runner, exact, seed=0)
    assert errors["logits"] < (FLIPPED if multiplies_bf16() else 5e-3), errors
    text = runner.admit(tokens)
    runner.compute([(text, 150)], [])
    for found, wanted in zip(runner.cached(text), exact(tokens, torch.bfloat16)[1:], strict=True):
        assert worst(found, wanted) < FLIPPED
        assert (found != wanted).double().mean().item() < (0.3 if multiplies_bf16() else 0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_decoder_computes_any_number_of_rows(name: str, dtype: torch.dtype) -> None:
    """The rows of a pass are cut into strips of 6 or 8, and these into blocks of 16."""
    model = build(name, dtype)
    tokens = random_ids(150)
    expected = exactly(model)(tokens, torch.float32)
    limit = FLIPPED if dtype == torch.bfloat16 and multiplies_bf16() else ROUNDING
    for count in (*range(1, 41), 96, 97, 129, 150):
        runner = Runner(model, 150)
        text = runner.admit(tokens[:count])
        logits = runner.compute([(text, count)], range(count))
        assert worst(logits, expected.logits[:count]) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_decoder_gives_the_same_bits_however_a_text_is_computed(name: str, dtype: torch.dtype) -> None:
    """In any pieces, beside any others, after what others computed of it, or at once and alone."""
    model = build(name, dtype)
    texts, logits = random_run(Runner(model, 700, dtype), random.Random(1))
    assert sum(map(len, logits)) > 100
    for text, found in zip(texts, logits, strict=True):
        runner = Runner(model, 150, dtype)
        alone = runner.admit(text.tokens)
        expected = runner.compute([(alone, alone.left)], range(len(text.tokens)))
        for position, row in found.items():
            assert torch.equal(row, expected[position])


def digest(threads: int, passes: int) -> list[torch.Tensor]:
    """Everything that some passes of a group and of a prompt compute, on so many threads."""
    model = build("llama")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runner = Runner(model, 700)
        texts = [runner.admit(random_ids(60) + random_ids(passes + i, seed=i)) for i in range(5)]
        found = [runner.compute([(text, 60 + i) for i, text in enumerate(texts)], range(300))]
        for _ in range(passes):
            found.append(runner.compute([(text, 1) for text in texts], range(5)))
        return [*found, *(x for text in texts for x in runner.cached(text))]
    finally:
        torch.set_num_threads(before)


def test_decoder_gives_the_same_bits_on_any_number_of_threads() -> None:
    """More threads than cores included, where those that are waited for may not be running."""
    alone = digest(1, passes=40)
    for threads in (2, 3, 5, 33):
        for one, other in zip(alone, digest(threads, passes=40), strict=True):
            assert torch.equal(one, other)


def decoder_case() -> dict[str, Any]:
    """Arguments of `decode`: one token after 2 others, and two that begin a text."""
    weights = pack_weights(build("llama"))
    torch.manual_seed(0)
    return {
        "hidden": torch.randn(3, 54),
        "cos": torch.randn(3, 16),
        "sin": torch.randn(3, 16),
        "keys": torch.randn(2, 10, 2, 16),
        "values": torch.randn(2, 10, 2, 16),
        "new_slots": torch.tensor([7, 0, 9]),
        "slots": torch.tensor([1, 2, 7, 0, 9]),
        "slot_starts": torch.tensor([0, 3, 5]),
        "query_starts": torch.tensor([0, 1, 3]),
        "rows": torch.tensor([0, 2]),
        "weights": weights,
    }


def with_layer(weights: DecoderWeights, **parts: torch.Tensor) -> DecoderWeights:
    return weights._replace(layers=[weights.layers[0], weights.layers[1]._replace(**parts)])


def test_decoder_names_what_does_not_fit() -> None:
    case = decoder_case()
    weights = case["weights"]
    layer = weights.layers[0]
    in_bf16 = pack_weights(build("llama", torch.bfloat16))
    before = {name: value.clone() for name, value in case.items() if name != "weights"}
    for name, wrong, message in (
        ("hidden", case["hidden"].double(), "hidden"),
        ("hidden", case["hidden"][0], "hidden"),
        ("hidden", case["hidden"][:, :52], "hidden"),
        ("hidden", case["hidden"][:, :52].contiguous(), "input norm"),
        ("hidden", case["hidden"][:2], "cos"),
        ("cos", case["cos"].double(), "cos"),
        ("cos", case["cos"][:, :8], "cos"),
        ("sin", case["sin"][:2], "sin"),
        ("keys", case["keys"].double(), "keys"),
        ("keys", case["keys"][0], "keys"),
        ("keys", case["keys"].transpose(1, 2), "keys"),
        ("values", case["values"].bfloat16(), "values"),
        ("values", case["values"][:, :9], "values"),
        ("values", case["values"][:1], "values"),
        ("values", case["values"].view(2, 20, 1, 16), "values"),
        ("new_slots", torch.tensor([7, 0, 10]), r"new_slots must be in \[0, 10\)"),
        ("new_slots", torch.tensor([7, -1, 9]), r"new_slots must be in \[0, 10\)"),
        ("new_slots", torch.tensor([7, 0]), "new_slots must be a contiguous CPU vector of 3 int64"),
        ("new_slots", torch.tensor([7, 0, 9]).int(), "new_slots"),
        ("slots", torch.tensor([1, 2, 7, 0, 10]), r"^slots must be in \[0, 10\)"),
        ("slots", torch.tensor([1, 2, 7, 0, -1]), r"slots must be in \[0, 10\)"),
        ("slots", torch.tensor([1, 2, 7, 0, 9]).int(), "slots"),
        ("slots", torch.tensor([[1, 2, 7, 0, 9]]), "slots"),
        ("slot_starts", torch.tensor([0, 3, 4]), "slot_starts must rise from 0 to 5"),
        ("slot_starts", torch.tensor([0, 6, 5]), "slot_starts must rise from 0 to 5"),
        ("slot_starts", torch.tensor([0, 4, 5]), "segment 1 has more queries than keys"),
        ("slot_starts", torch.tensor([], dtype=torch.int64), "slot_starts"),
        ("query_starts", torch.tensor([0, 1, 2]), "query_starts must rise from 0 to 3"),
        ("query_starts", torch.tensor([1, 2, 3]), "query_starts must rise from 0 to 3"),
        ("query_starts", torch.tensor([0, 3]), "query_starts"),
        ("rows", torch.tensor([0, 3]), r"rows must be in \[0, 3\)"),
        ("rows", torch.tensor([-1]), r"rows must be in \[0, 3\)"),
        ("rows", torch.tensor([0]).int(), "rows"),
        ("weights", weights._replace(layers=weights.layers[:1]), "nine tensors a layer"),
        ("weights", weights._replace(heads=5), "heads must be a multiple of the kv heads"),
        ("weights", weights._replace(heads=0), "heads must be a multiple of the kv heads"),
        ("weights", weights._replace(heads=4), "qkv"),
        ("weights", weights._replace(gated_width=200), "gate and up projection"),
        ("weights", weights._replace(vocabulary=200), "head"),
        ("weights", weights._replace(head=weights.head.double()), "head"),
        ("weights", weights._replace(final_norm=weights.final_norm[:50]), "final norm"),
        ("weights", with_layer(weights, input_norm=layer.input_norm.bfloat16()), "input norm"),
        ("weights", with_layer(weights, post_norm=torch.empty(0)), "post norm"),
        ("weights", with_layer(weights, qkv_bias=torch.zeros(54)), "bias"),
        ("weights", with_layer(weights, q_norm=torch.zeros(54)), "query norm"),
        ("weights", with_layer(weights, k_norm=torch.zeros(54)), "key norm"),
        ("weights", with_layer(weights, output=layer.qkv), "output projection"),
        ("weights", with_layer(weights, gate_up=layer.down), "gate and up projection"),
        ("weights", with_layer(weights, down=layer.down.half()), "down projection"),
        ("weights", with_layer(weights, down=in_bf16.layers[1].down), "one dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            decode(**case | {name: wrong})
    for name, value in before.items():
        assert torch.equal(case[name], value), name
    assert decode(**case).isfinite().all()
    nothing = {name: case[name][:0] for name in ("hidden", "cos", "sin", "new_slots", "slots", "rows")}
    starts = {name: torch.tensor([0]) for name in ("slot_starts", "query_starts")}
    assert decode(**case | nothing | starts).shape == (0, VOCABULARY)


def other_linear(model: PreTrainedModel) -> PreTrainedModel:
    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model.model.layers[1].mlp.up_proj = Doubled(54, 70, bias=False)
    return model


def mistral() -> PreTrainedModel:
    config = MistralConfig(
        vocab_size=9, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: build("llama").to("meta"), "the model is on meta"),
        (lambda: build("llama").half(), "its weights are torch.float16"),
        (lambda: build("llama").double(), "its weights are torch.float64"),
        (lambda: build("llama", hidden_act="gelu"), "its activation is gelu, not silu"),
        (lambda: build("llama", attention_bias=True), "model.layers.0.self_attn.o_proj has a bias"),
        (lambda: build("llama", mlp_bias=True), "model.layers.0.mlp.gate_proj has a bias"),
        (lambda: other_linear(build("llama")), "model.layers.1.mlp.up_proj is no plain linear layer"),
        (
            lambda: AutoModelForCausalLM.from_config(MistralConfig(vocab_size=9, hidden_size=32, num_hidden_layers=1)),
            "M",
        ),
    ],
)
def test_other_models_are_not_given_to_the_decoder(model: Callable[[], PreTrainedModel], message: str) -> None:
    reason = native_forward_off_reason(model())
    assert reason is not None and message in reason


def test_the_decoder_is_off_where_nothing_was_built(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [native_forward_off_reason(build(name)) for name in MODELS] == [None] * 4
    monkeypatch.setattr(native_forward, "native_off_reason", lambda: "csrc/ was not built")
    assert native_forward_off_reason(build("llama")) == "csrc/ was not built"


# --- would the tests notice? ------------------------------------------------------------------------------------------


def swapped_head_norms(weights: DecoderWeights) -> DecoderWeights:
    return weights._replace(layers=[w._replace(q_norm=w.k_norm, k_norm=w.q_norm) for w in weights.layers])


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights._replace(scale=1.0003 * weights.scale),
        lambda weights: weights._replace(epsilon=1.001 * weights.epsilon),
        lambda weights: weights._replace(final_norm=weights.final_norm * (1 + 2**-12)),
        swapped_head_norms,
    ],
    ids=["scale", "epsilon", "final norm", "head norms"],
)
def test_a_corrupted_decoder_is_noticed(
    change: Callable[[DecoderWeights], DecoderWeights], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_forward, "pack_weights", lambda model: change(pack_weights(model)))
    with pytest.raises(AssertionError):
        test_decoder_equals_hugging_face("qwen3")
