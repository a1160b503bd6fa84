"""SGLang's server on a CPU: `python -m sglang_cpu` in place of `python -m sglang.launch_server`, same arguments.

SGLang 0.5.23 computes in plain torch where there is no GPU, but a few things on the way there need one. They are put
right here, before SGLang is imported. Its worker processes import the main module again, and so get the same.

    N sequences    V vocabulary
"""

import runpy
import sys
import types

import torch

# torchvision's native library is built for CUDA and does not load beside torch for CPUs; its Python code registers
# shapes for these two operators all the same. `_torchvision` is kept: the schemas live as long as it does.
_torchvision = torch.library.Library("torchvision", "FRAGMENT")
if torch.version.cuda is None:
    for name in ("nms", "qnms"):
        _torchvision.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def _never_called(*args, **kwargs):
    raise NotImplementedError("vllm is not installed; SGLang rotates in plain torch on the CPU")


# Taken from vllm when a model is built, and not used afterwards.
_custom_ops = types.ModuleType("vllm._custom_ops")
_custom_ops.rotary_embedding = _never_called
sys.modules["vllm"] = types.ModuleType("vllm")
sys.modules["vllm._custom_ops"] = _custom_ops


# The rest is for --enable-deterministic-inference, without which SGLang ignores the seed of a request.
def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 (x86, 32 bits, seed 0) of (seed[N] as two words, positions[N], columns[V]) as uint32[N, V]."""
    low = 0xFFFFFFFF
    seed, positions, columns = seed.to(torch.int64), positions.to(torch.int64), columns.to(torch.int64)
    words = (seed & low)[:, None], (seed >> 32 & low)[:, None], (positions & low)[:, None], (columns & low)[None]
    h = torch.zeros(1, 1, dtype=torch.int64)
    for word in words:
        k = word * 0xCC9E2D51 & low
        k = (k << 15 | k >> 17) * 0x1B873593 & low
        h = h ^ k
        h = (h << 13 & low | h >> 19) * 5 + 0xE6546B64 & low
    h = h ^ 4 * len(words)
    h = (h ^ h >> 16) * 0x85EBCA6B & low
    h = (h ^ h >> 13) * 0xC2B2AE35 & low
    return (h ^ h >> 16).to(torch.uint32)


import sglang.kernels.ops.sampling.murmur_hash  # noqa: E402  (needs the schemas above)

sglang.kernels.ops.sampling.murmur_hash.murmur_hash32 = murmur_hash32  # the one there asks for a package of kernels

from sglang.srt import batch_invariant_ops, server_args  # noqa: E402

assert "sglang.srt.layers.sampler" not in sys.modules, "the sampler has already taken the hash that needs a GPU"
batch_invariant_ops.enable_batch_invariant_mode = lambda: None  # Triton kernels for CUDA
server_args.add_deterministic_attention_backend_choices(["torch_native"])
server_args.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
