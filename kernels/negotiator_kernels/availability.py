"""Which backends this machine can use, and why not the others. `python -m negotiator_kernels` prints it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Backend:
    name: str
    device: str  # type of the devices whose tensors it takes
    on: bool
    detail: str  # what it runs on, or why it is off


def backends() -> list[Backend]:
    """Every backend that some operator has, apart from plain torch, which is always there."""
    return [
        _backend("native", "cpu", native_off_reason(), _instruction_set),
        _backend("native", "cuda", native_cuda_off_reason(), torch.cuda.get_device_name),
        _backend("triton", "cuda", triton_off_reason(), _triton),
    ]


def _backend(name: str, device: str, off_reason: str | None, describe: Callable[[], str]) -> Backend:
    return Backend(name, device, off_reason is None, describe() if off_reason is None else off_reason)


@functools.cache
def native_off_reason() -> str | None:
    """None when the CPU operators of `csrc/` are loaded, else the reason in one sentence."""
    spec = importlib.util.find_spec("negotiator_kernels._C")
    if spec is None or spec.origin is None:
        return "csrc/ was not built: run make env, or pip install --no-build-isolation -e ."
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        return f"{spec.origin} does not load with torch {torch.__version__}: {error}"
    return None


def native_cuda_off_reason() -> str | None:
    """None when the GPU kernels of `csrc/` are loaded and there is a GPU, else the reason in one sentence."""
    if (reason := native_off_reason()) is not None:
        return reason
    if not native_has_cuda():
        return "csrc/ was built without a CUDA compiler: install nvcc and build again"
    return cuda_off_reason()


def native_has_cuda() -> bool:
    """Whether `csrc/`, which is loaded, was built with its GPU kernels; they need no GPU to be there."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("negotiator_kernels::tile_exponentials", "CUDA")


def cuda_off_reason() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no CUDA device"


def triton_off_reason() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with CUDA builds of torch"
    return cuda_off_reason()


def _triton() -> str:
    return f"triton {importlib.metadata.version('triton')}, {torch.cuda.get_device_name()}"


def _instruction_set() -> str:
    name: str = torch.ops.negotiator_kernels.instruction_set()
    return f"{name} kernels, {torch.get_num_threads()} threads"
