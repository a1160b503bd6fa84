"""What only a GPU can show: the embedded engine, the packed trainer and the loss agree with their oracles there."""

import asyncio

import pytest
import torch
from helpers import SMOLLM2
from transformers import AutoModelForCausalLM, AutoTokenizer

from negotiator.config import EngineConfig, LossConfig, OptimizerConfig
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.learner import Learner
from negotiator.loss import grpo_loss, off_reason
from negotiator.models import load_model
from negotiator.packing import pack
from negotiator.types import SamplingParams, TurnSample

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
PROMPTS = [
    "The mill by the river has to close. What do you propose?",
    "Say in one sentence why neighbours quarrel.",
    "A nurse has found a mistake in the rota, and the ward is already short of hands. What should she do first?",
    "Count from one to twenty.",
]


def generate(dtype: torch.dtype, sampling: list[SamplingParams], prompts: list[list[int]]):
    async def main():
        engine = EmbeddedEngine(load_model(SMOLLM2, CUDA, dtype), EngineConfig(cache_tokens=4096, prefill_tokens=48))
        return await asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, sampling, strict=True)))

    return asyncio.run(main())


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


def test_greedy_is_hugging_face_token_for_token(prompts):
    ours = generate(torch.float32, [SamplingParams(40, temperature=0.0)] * len(prompts), prompts)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).to(CUDA).eval()
    for prompt, generation in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt], device=CUDA)
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=40)
        assert list(generation.ids[: theirs.shape[1] - len(prompt)]) == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.04)])
def test_trainer_and_engine_agree_on_log_probs(prompts, dtype, bound):
    sampling = [SamplingParams(40, temperature=0.7, top_p=0.95, seed=seed) for seed in range(len(prompts))]
    samples = [
        TurnSample(tuple(prompt), generation.ids, generation.logprobs, 1.0, (number, "agent1"), len(prompt) // 2)
        for number, (prompt, generation) in enumerate(zip(prompts, generate(dtype, sampling, prompts), strict=True))
    ]
    learner = Learner(load_model(SMOLLM2, CUDA, dtype), OptimizerConfig(), LossConfig(), temperature=0.7)
    stats = learner.step(0, pack(samples, 128), denominator=100.0)
    assert stats.logprob_gap < bound
    assert 0 < stats.grad_norm < 1e4


@pytest.mark.parametrize("backend", ["torch", "native", "triton", "triton_gemm"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo", "cispo", "gspo"])
def test_loss_is_near_fp64(loss_type, backend):
    if (reason := off_reason(backend, CUDA, torch.bfloat16)) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    rows, size, vocabulary = 300, 64, 1003
    hidden = torch.randn(rows, size).bfloat16()
    weight = (0.5 * torch.randn(vocabulary, size)).bfloat16()
    arguments = {
        "targets": torch.randint(vocabulary, (rows,)),
        "advantages": torch.randn(30).repeat_interleave(10),
        "mask": torch.rand(rows) < 0.5,
        "sequence_ids": torch.arange(30).repeat_interleave(10),
    }
    keywords = {"loss_type": loss_type, "temperature": 0.7, "entropy_coef": 0.01}

    def gradients(device, dtype, backend):
        h, w = (t.to(device, dtype).requires_grad_() for t in (hidden, weight))
        moved = {name: value.to(device) for name, value in arguments.items()}
        moved["advantages"] = moved["advantages"].to(torch.promote_types(dtype, torch.float32))
        result = grpo_loss(h, w, **moved, **keywords, backend=backend)
        result.loss.backward()
        return torch.cat([h.grad.flatten(), w.grad.flatten()]).double().cpu(), result.logprobs.double().cpu()

    expected, logprobs = gradients("cpu", torch.float64, "reference")
    found, found_logprobs = gradients(CUDA, torch.bfloat16, backend)
    assert (found - expected).norm() / expected.norm() < 2.6e-3
    trained = arguments["mask"]
    assert (found_logprobs - logprobs)[trained].abs().max() < 1e-4
