"""What is computed again changes no gradient, and is not kept."""

import pytest
import torch
from helpers import made_up_samples, tiny_llama

from negotiator.config import LossConfig, OptimizerConfig
from negotiator.learner import Learner
from negotiator.packing import pack


def gradients_and_kept_bytes(what: str, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], int]:
    learner = Learner(tiny_llama(dtype), OptimizerConfig(recompute=what), LossConfig(), 0.7)
    parameters = {p.data_ptr() for p in learner.model.parameters()}
    (batch,) = pack(made_up_samples(), 10_000)
    kept = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.nbytes * (tensor.data_ptr() not in parameters)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, *_ = learner.policy(batch, 60.0)
    loss.backward()
    return {name: master.grad for name, master in learner.masters.items()}, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_stay_and_less_is_kept(dtype):
    expected, most = gradients_and_kept_bytes("none", dtype)
    for what in ("selective", "full"):
        found, kept = gradients_and_kept_bytes(what, dtype)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert kept < 0.5 * most
