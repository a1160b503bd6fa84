"""Attention by layout: a packed batch equals its sequences one by one, and unsuitable models are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3Config,
)

from negotiator.attention import PackedLayout, use_negotiator_attention
from negotiator.types import Segment

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # attention far from uniform
}
Sample = tuple[list[int], list[int]]  # prefix, and what follows it


def tiny(config: type, attention: str = "sdpa", **more: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**TINY | more), attn_implementation=attention).eval()


def draw_samples() -> list[list[Sample]]:
    """Three groups that share a prefix each, the last without one, and suffixes of lengths 1 to 17."""
    generator = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        return torch.randint(97, (count,), generator=generator).tolist()

    groups = []
    for prefix_len, lengths in ((11, (5, 1, 17)), (1, (4, 9)), (0, (13, 6))):
        prefix = ids(prefix_len)
        groups.append([(prefix, ids(n)) for n in lengths])
    return groups


def packed_logprobs(model: PreTrainedModel, groups: list[list[Sample]]) -> dict[tuple[int, ...], torch.Tensor]:
    """Log-probs [V] after the last token of each sample, from one packed forward pass; by the sample's tokens."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    last: dict[tuple[int, ...], int] = {}

    def append(tokens: list[int], prefix: Segment | None) -> Segment:
        offset = prefix.end - prefix.start if prefix else 0
        start, end = len(ids), len(ids) + len(tokens)
        segments.append(Segment(start, end, prefix.start, prefix.end) if prefix else Segment(start, end))
        ids.extend(tokens)
        positions.extend(range(offset, offset + len(tokens)))
        return segments[-1]

    for group in groups:
        prefix = append(group[0][0], None) if group[0][0] else None
        for before, after in group:
            last[(*before, *after)] = append(after, prefix).end - 1
    logits = model(
        torch.tensor([ids]), position_ids=torch.tensor([positions]), layout=PackedLayout(segments), use_cache=False
    ).logits[0]
    return {key: logits[row].log_softmax(-1) for key, row in last.items()}


def gradients(model: PreTrainedModel, logprobs: dict[tuple[int, ...], torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.stack([row[key[0]] * (1 + len(key)) for key, row in sorted(logprobs.items())]).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", [LlamaConfig, Qwen3Config])
def test_packed_equals_separate_sequences(config: type) -> None:
    groups = draw_samples()
    plain, packed = tiny(config), tiny(config)
    use_negotiator_attention(packed)
    samples = [sample for group in groups for sample in group]
    separate = {(*p, *s): plain(torch.tensor([p + s])).logits[0, -1].log_softmax(-1) for p, s in samples}
    together = packed_logprobs(packed, groups)
    assert together.keys() == separate.keys()
    for key, row in separate.items():
        torch.testing.assert_close(together[key], row, atol=1e-5, rtol=0)
    expected, actual = gradients(plain, separate), gradients(packed, together)
    for name, gradient in expected.items():
        assert gradient.norm() > 0
        assert (actual[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_packing_order_changes_nothing() -> None:
    model = tiny(LlamaConfig)
    use_negotiator_attention(model)
    groups = draw_samples()
    one = packed_logprobs(model, groups)
    other = packed_logprobs(model, [group[::-1] for group in groups[::-1]])
    for key, row in one.items():
        torch.testing.assert_close(other[key], row, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "more", "message"),
    [
        (MistralConfig, {"sliding_window": 8}, "sliding_window"),
        (Qwen3Config, {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding_window"),
        (Gemma2Config, {"sliding_window": None, "layer_types": ["full_attention"] * 2}, "softcap"),
        (GptOssConfig, {"num_local_experts": 2, "layer_types": ["full_attention"] * 2}, "s_aux"),
        (GraniteConfig, {"logits_scaling": 8.0}, "logits"),
    ],
)
def test_unsupported_models_are_refused(config: type, more: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_negotiator_attention(tiny(config, attention="eager", **more))


def test_attention_dropout_is_refused_in_training() -> None:
    with pytest.raises(ValueError, match="dropout"):
        use_negotiator_attention(tiny(LlamaConfig, attention_dropout=0.1).train())


def test_without_layout_or_with_mask_fails() -> None:
    model = tiny(LlamaConfig)
    use_negotiator_attention(model)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="layout"):
        model(ids)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3), layout=PackedLayout([Segment(0, 3)]), use_cache=False)
    model.set_attn_implementation("sdpa")
    assert model(ids).logits.shape == (1, 3, 97)


def test_saved_model_does_not_mention_it(tmp_path: Path) -> None:
    model = tiny(LlamaConfig)
    expected = model(torch.tensor([[5, 6, 7]])).logits
    use_negotiator_attention(model)
    model.save_pretrained(tmp_path)
    assert "negotiator" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(torch.tensor([[5, 6, 7]])).logits, expected)
