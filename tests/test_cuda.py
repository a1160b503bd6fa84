"""What only a GPU can show: the embedded engine, the packed trainer and the loss agree with their oracles there."""

import asyncio
import subprocess
import sys

import pytest
import torch
from helpers import SMOLLM2
from test_native_ops import sampling_case
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from negotiator.config import EngineConfig, LossConfig, OptimizerConfig
from negotiator.engines import weight_sync
from negotiator.engines.cuda_graphs import GraphedForward, graphed_forward_off_reason
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.engines.forward import HuggingFaceForward, Span
from negotiator.engines.kv_cache import KVCache
from negotiator.engines.weight_sync import Link
from negotiator.learner import Learner
from negotiator.loss import grpo_loss, off_reason
from negotiator.models import load_model
from negotiator.packing import pack
from negotiator.types import SamplingParams, TurnSample
from negotiator_kernels import sample
from negotiator_kernels.sampling import sample_lists, sample_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
PROMPTS = [
    "The mill by the river has to close. What do you propose?",
    "Say in one sentence why neighbours quarrel.",
    "A nurse has found a mistake in the rota, and the ward is already short of hands. What should she do first?",
    "Count from one to twenty.",
]


LIMITS = EngineConfig(cache_tokens=4096, prefill_tokens=48)


def kernel_by_kernel(model, cache):
    return HuggingFaceForward(model, cache)


def graphs(model, cache):
    return GraphedForward(model, cache, LIMITS)


def generate(dtype: torch.dtype, sampling: list[SamplingParams], prompts: list[list[int]], make_forward=None):
    async def main():
        model = load_model(SMOLLM2, CUDA, dtype)
        engine = EmbeddedEngine(model, LIMITS)
        if make_forward is not None:
            engine._forward = make_forward(model, engine._cache)
        return await asyncio.gather(*(engine.generate(p, s) for p, s in zip(prompts, sampling, strict=True)))

    return asyncio.run(main())


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=False) for c in chats]


@pytest.mark.parametrize("make_forward", [kernel_by_kernel, graphs])
def test_greedy_is_hugging_face_token_for_token(prompts, make_forward):
    ours = generate(torch.float32, [SamplingParams(40, temperature=0.0)] * len(prompts), prompts, make_forward)
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


def test_graphs_change_no_log_prob_beyond_rounding(prompts):
    """The same prompts several times, so that most of them are shared."""
    prompts = [prompt for prompt in prompts for _ in range(5)]
    sampling = [SamplingParams(30, temperature=0.7, seed=seed) for seed in range(len(prompts))]
    ways = [generate(torch.float32, sampling, prompts, make) for make in (graphs, kernel_by_kernel)]
    for found, expected in zip(*ways, strict=True):
        assert found.ids == expected.ids
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-3)


def tiny(**more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=97, num_hidden_layers=2, initializer_range=0.2, **sizes, **more)
    return LlamaForCausalLM(config).eval().to(CUDA)


def test_graphs_see_new_weights_in_place_and_elsewhere():
    model = tiny()
    cache = KVCache(model, 64)
    forward, plain = GraphedForward(model, cache, LIMITS), HuggingFaceForward(model, cache)
    spans = [Span(cache.reserve([], 8), 0, 5, [1, 2, 3, 4, 5])]
    before = forward(spans, [4]).clone()
    torch.testing.assert_close(before, plain(spans, [4]), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    recorded = forward._graph(8)
    forward.weights_changed()
    assert forward._graph(8) is recorded
    after = forward(spans, [4]).clone()
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, plain(spans, [4]), rtol=1e-4, atol=1e-4)
    for weight in model.parameters():
        weight.data = weight.data * 1.1
    forward.weights_changed()
    torch.testing.assert_close(forward(spans, [4]), plain(spans, [4]), rtol=1e-4, atol=1e-4)


def test_a_model_that_waits_for_the_gpu_is_not_recorded():
    assert graphed_forward_off_reason(tiny()) is None
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert "LlamaForCausalLM waits for the GPU" in graphed_forward_off_reason(tiny(rope_parameters=rope))


RECEIVER = """
import base64, io, pickle, sys, torch
from torch.multiprocessing import reductions

# SGLang does this when it starts: handles name a GPU by its id, and each process counts GPUs in its own way.
plain = reductions.rebuild_cuda_tensor
gpus = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
reductions.rebuild_cuda_tensor = lambda *a: plain(*a[:6], gpus[a[6]], *a[7:])
bucket = pickle.load(io.BytesIO(base64.b64decode(sys.stdin.buffer.read())))
for meta in bucket["metadata"]:
    data = bucket["flattened_tensor"][meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)
    print(meta.name, data.device.type, data.double().sum().item())
"""


def test_weights_reach_another_process_as_a_handle():
    """What the servers that share the trainer's GPU are sent, read by a process of its own as they read it."""
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in tiny().state_dict().items()}
    link = Link(client=None, way="tensor", device=CUDA, folder=None, timeout_s=1.0)
    ((layout, flat),) = weight_sync._flat_buckets(link, weights.items())
    payload = weight_sync._pickle_handle({"flattened_tensor": flat, "metadata": layout})
    assert len(payload) < flat.nbytes / 4, "the bytes themselves were sent"
    torch.cuda.synchronize()
    answer = subprocess.run([sys.executable, "-c", RECEIVER], input=payload, capture_output=True, check=True)
    found = [line.split() for line in answer.stdout.decode().splitlines()]
    assert found == [[name, "cuda", str(tensor.double().sum().item())] for name, tensor in weights.items()]


@pytest.mark.parametrize(("rows", "vocabulary"), [(32, 49_152), (5, 151_936)])
def test_sampling_equals_the_reference_and_waits_once(rows, vocabulary):
    logits, *rest = (argument.to(CUDA) for argument in sampling_case(rows, vocabulary, 3.0))
    lists = [argument.tolist() for argument in rest]
    for of in (logits, logits.bfloat16().float()):  # the latter with many equal logits
        ids, logprobs = sample(of, *rest, backend="triton")
        want_ids, want_logprobs = sample_reference(of, *rest)
        assert torch.equal(ids, want_ids)
        torch.testing.assert_close(logprobs, want_logprobs, rtol=1e-6, atol=1e-6)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as warnings:
                found = sample_lists(of, *lists)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found == (ids.tolist(), logprobs.tolist())
        assert sum("synchronizing" in str(warning.message) for warning in warnings) == 1
