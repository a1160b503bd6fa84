"""The processes that train together, as torchrun starts them: who is who, what they tell each other, who holds what.

One process alone needs no process group: everything here then does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes files and speaks to the user."""
        return self.rank == 0


ALONE = World()


@dataclass(frozen=True, slots=True)
class Sharding:
    """How weights are cut over the processes."""

    world: World
    dtype: torch.dtype  # of the computation
    replicas: int = 1  # groups of processes that hold a whole copy each (HSDP)
    offload: bool = False  # weights and optimizer stay in the CPU's memory
    replicate: bool = False  # they are not cut at all: everybody holds all of them, and gradients are averaged

    def __post_init__(self) -> None:
        if self.world.size % self.replicas:
            raise ValueError(
                f"{self.world.size} processes cannot hold {self.replicas} replicas of equal size: "
                "parallel.replicas must divide their number"
            )


def join(timeout_s: float) -> World:
    """Joins the processes that torchrun has started. `timeout_s`: longest wait for the others."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return ALONE
    # Objects and scalars travel between CPUs, whatever the gradients do.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    world = World(int(os.environ["RANK"]), size, int(os.environ["LOCAL_RANK"]))
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return world


def leave(world: World) -> None:
    if world.size > 1:
        dist.destroy_process_group()


def gather(world: World, item: T) -> list[T]:
    """Everybody's item, in order of rank, for everybody."""
    items: list[Any] = [item]
    if world.size > 1:
        items = [None] * world.size
        dist.all_gather_object(items, item)
    return items


def from_leader(world: World, item: T) -> T:
    """The leader's item, for everybody."""
    items = [item]
    if world.size > 1:
        dist.broadcast_object_list(items)
    return items[0]


def sum_up(world: World, values: Sequence[float]) -> list[float]:
    """The sums over all processes, for everybody."""
    if world.size == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums)
    result: list[float] = sums.tolist()
    return result


def average(world: World, tensors: Sequence[torch.Tensor]) -> None:
    """Puts into each of `tensors`, which are of one dtype, its mean over all processes."""
    if tensors:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= world.size
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def own_share(world: World, items: Sequence[T]) -> list[T]:
    """What this process takes of `items`: every `world.size`-th."""
    return list(items[world.rank :: world.size])


def shard(policy: nn.Module, model: PreTrainedModel, sharding: Sharding) -> None:
    """Cuts the fp32 parameters of `policy`, which holds `model`, over the processes (FSDP2), layer by layer.

    Gradients are averaged over the processes, in fp32.
    """
    precision = MixedPrecisionPolicy(sharding.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    settings: dict[str, Any] = {
        "mesh": _mesh(model.device.type, sharding.world.size, sharding.replicas),
        "mp_policy": precision,
        "offload_policy": CPUOffloadPolicy() if sharding.offload else OffloadPolicy(),
    }
    for module in (*decoder_layers(model), policy):
        fully_shard(module, **settings)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


@dataclass(frozen=True, slots=True)
class WholeTensors:
    """Whole tensors in place of sharded ones, gathered one by one whenever somebody iterates, which all have to do."""

    named: Sequence[tuple[str, torch.Tensor]]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.named:
            yield name, full_tensor(tensor)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.full_tensor()


def _mesh(device_type: str, size: int, replicas: int) -> DeviceMesh:
    if replicas == 1:
        return init_device_mesh(device_type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device_type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
