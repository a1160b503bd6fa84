"""The trainer's weights to SGLang servers, a bucket at a time.

    begin -> bucket, bucket, ... -> end -> flush -> version        on all servers side by side, every answer checked

A bucket travels in one of three ways:

    tensor       inside the request: the CUDA IPC handle of a tensor on a GPU; for one on the CPU its bytes, very slowly
    distributed  broadcast, by NCCL from a GPU and by gloo from a CPU, in a group that lives for one sync
    disk         as a safetensors file in a folder that the servers read under the same path

SGLang takes weights under their Hugging Face names and skips names it does not know without a word. So `prove` makes
sure that a sync writes everything a server has.

Left out: weights that are sharded over trainer processes (whoever gathers them passes an iterable that gathers one
tensor at a time), LoRA adapters.
"""

from __future__ import annotations

import asyncio
import base64
import io
import pickle
import shutil
import socket
import uuid
from collections.abc import Awaitable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import httpx
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # not re-exported by name
from torch.multiprocessing import reductions

from negotiator.engines.sglang_http import Refused, Unreachable, call

BUCKET_BYTES = {"cpu": 2**26, "cuda": 2**29}  # by the device of the weights
GROUP_TIMEOUT_S = 120.0  # of one step of a process group
FLUSH_S = 30.0  # that a server waits for requests that were cancelled

Way = Literal["tensor", "distributed", "disk"]
Weights = Iterable[tuple[str, torch.Tensor]]  # under Hugging Face names; iterated anew by every sync


@dataclass(frozen=True, slots=True)
class Receiver:
    """A server, and how many of its processes take part in a sync."""

    url: str
    tp_size: int


@dataclass(frozen=True, slots=True)
class Link:
    """How weights travel."""

    client: httpx.AsyncClient
    way: Way
    device: torch.device  # of the weights
    folder: Path  # disk: where the files go
    timeout_s: float  # of one call


def choose_way(wanted: Literal["auto"] | Way, device: torch.device, same_gpu: bool) -> tuple[Way, str]:
    """The way, and why. `same_gpu`: all servers compute on the GPU that holds the weights."""
    if wanted != "auto":
        return wanted, "as configured"
    if device.type == "cuda" and same_gpu:
        return "tensor", "CUDA IPC, as the servers share the trainer's GPU"
    return "distributed", "NCCL, as the servers have other GPUs" if device.type == "cuda" else "gloo, from the CPU"


async def push(link: Link, servers: Sequence[Receiver], weights: Weights, version: int) -> None:
    """Makes every server serve `weights` as `version`, with nothing of older ones in its cache.

    No request may be running there. Raises Unreachable, naming the server that failed, or Refused.
    """
    if link.way == "disk":
        await _push_files(link, servers, weights, version)
    else:
        await _all(_begin(link, server) for server in servers)
        if link.way == "tensor":
            await _push_tensors(link, servers, weights)
        else:
            await _push_broadcasts(link, servers, weights)
        await _each(link, servers, "/end_weight_update", {})
    await _each(link, servers, f"/flush_cache?timeout={min(FLUSH_S, link.timeout_s):g}", {})
    name = {"new_version": str(version), "abort_all_requests": False}
    await _each(link, servers, "/update_weight_version", name)


async def prove(link: Link, servers: Sequence[Receiver], weights: Weights, version: int) -> None:
    """Raises RuntimeError unless a sync writes every tensor of a server, and the same values as the one before it.

    The servers tell their checksums, scramble what they have, get the weights again and tell them anew. No request may
    be running there.
    """
    before = await _checksums(link, servers)
    await _each(link, servers, "/weights_checker", {"action": "reset_tensors"})
    await push(link, servers, weights, version)
    after = await _checksums(link, servers)
    for server, old, new in zip(servers, before, after, strict=True):
        lost = sorted(name for (rank, name) in old if new[rank, name] != old[rank, name])
        if lost:
            raise RuntimeError(
                f"{len(lost)} of the {len(old)} tensors of {server.url} are not what a weight sync sends, "
                f"among them {', '.join(lost[:3])}: does it serve another model?"
            )


def buckets(weights: Weights, most_bytes: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Runs of tensors of one dtype and at most `most_bytes`; a larger tensor is a bucket of its own."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and (size + tensor.nbytes > most_bytes or tensor.dtype != bucket[0][1].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _flat_buckets(link: Link, weights: Weights) -> Iterator[tuple[list[SimpleNamespace], torch.Tensor]]:
    """Buckets as SGLang's "flattened_bucket": what lies where, and the bytes of all tensors end to end."""
    for bucket in buckets(weights, BUCKET_BYTES[link.device.type]):
        layout, end = [], 0
        for name, tensor in bucket:
            start, end = end, end + tensor.nbytes
            layout.append(
                SimpleNamespace(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    start_idx=start,
                    end_idx=end,
                    numel=tensor.nbytes,
                )
            )
        flat = torch.cat([tensor.reshape(-1) for _, tensor in bucket]).view(torch.uint8)
        bucket.clear()  # the copy is all that is held while it travels
        yield layout, flat


# -- tensor ------------------------------------------------------------------------------------------------------------


async def _push_tensors(link: Link, servers: Sequence[Receiver], weights: Weights) -> None:
    for layout, flat in _flat_buckets(link, weights):
        bucket = {"flattened_tensor": flat, "metadata": layout}
        if flat.is_cuda:
            torch.cuda.current_stream(flat.device).synchronize()
            bodies = [_tensor_request([_pickle_handle(bucket) for _ in range(s.tp_size)]) for s in servers]
        else:
            data = base64.b64encode(pickle.dumps(bucket))
            by_size = {size: _tensor_request([data] * size) for size in {s.tp_size for s in servers}}
            bodies = [by_size[s.tp_size] for s in servers]
        await _all(
            _accepted(link, server, "/update_weights_from_tensor", body)
            for server, body in zip(servers, bodies, strict=True)
        )


def _tensor_request(payloads: Sequence[bytes]) -> bytes:
    """The JSON of an update; `payloads` are base64, one for each tensor-parallel process."""
    quoted = b",".join(b'"%b"' % payload for payload in payloads)
    return b'{"serialized_named_tensors":[%b],"load_format":"flattened_bucket","flush_cache":false}' % quoted


def _pickle_handle(bucket: object) -> bytes:
    """Base64 of a pickle in which a CUDA tensor is an IPC handle. Each is for one receiver: torch counts them."""
    file = io.BytesIO()
    pickler: Any = ForkingPickler(file)
    pickler.dispatch_table[torch.Tensor] = _reduce_to_handle
    pickler.dump(bucket)
    return base64.b64encode(file.getvalue())


def _reduce_to_handle(tensor: torch.Tensor) -> tuple[Any, ...]:
    """torch's own handle, but naming the GPU by its id: servers may count GPUs differently. SGLang looks it up."""
    rebuild, arguments = reductions.reduce_tensor(tensor)
    device = 6  # place of the GPU's number among rebuild_cuda_tensor's arguments
    assert arguments[device] == tensor.device.index, "torch describes CUDA tensors differently"
    gpu = str(torch.cuda.get_device_properties(tensor.device).uuid)
    return rebuild, (*arguments[:device], gpu, *arguments[device + 1 :])


# -- distributed -------------------------------------------------------------------------------------------------------


async def _push_broadcasts(link: Link, servers: Sequence[Receiver], weights: Weights) -> None:
    """Builds the group anew each time: a server may have died or come back since the last sync."""
    name = f"weights-{uuid.uuid4().hex}"
    limit = timedelta(seconds=GROUP_TIMEOUT_S)
    backend = "nccl" if link.device.type == "cuda" else "gloo"
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=limit)
    world = 1 + sum(server.tp_size for server in servers)
    joins, rank = [], 1
    for server in servers:
        request = {
            "master_address": _address_towards(server.url),
            "master_port": store.port,
            "rank_offset": rank,
            "world_size": world,
            "group_name": name,
            "backend": backend,
        }
        joins.append(_accepted(link, server, "/init_weights_update_group", request))
        rank += server.tp_size
    group, *_ = await _all([asyncio.to_thread(_new_group, backend, store, name, world, limit), *joins])
    for layout, flat in _flat_buckets(link, weights):
        request = {
            "names": [tensor.name for tensor in layout],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in layout],
            "shapes": [tensor.shape for tensor in layout],
            "group_name": name,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        receive = [_accepted(link, server, "/update_weights_from_distributed", request) for server in servers]
        await _all([asyncio.to_thread(_broadcast, group, flat, limit), *receive])
    await _each(link, servers, "/destroy_weights_update_group", {"group_name": name})


def _new_group(backend: str, store: Store, name: str, world: int, limit: timedelta) -> Any:
    """Rank 0 of a group outside torch's global state. The prefixes are those under which SGLang's ranks meet."""
    store = PrefixStore(f"{name}/", PrefixStore(name, store))
    if backend == "gloo":
        return dist.ProcessGroupGloo(PrefixStore("cpu/", store), 0, world, limit)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit
    return dist.ProcessGroupNCCL(PrefixStore("cuda/", store), 0, world, options)


def _broadcast(group: Any, flat: torch.Tensor, limit: timedelta) -> None:
    group.broadcast(flat, 0).wait(limit)
    if flat.is_cuda:
        torch.cuda.current_stream(flat.device).synchronize()


def _address_towards(url: str) -> str:
    """This machine's address as the server sees it. Nothing is sent: connecting UDP only looks up the route."""
    target = httpx.URL(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target.host, target.port or 80))
        address: str = probe.getsockname()[0]
        return address


# -- disk --------------------------------------------------------------------------------------------------------------


async def _push_files(link: Link, servers: Sequence[Receiver], weights: Weights, version: int) -> None:
    folder = link.folder / f"version-{version}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        for number, bucket in enumerate(buckets(weights, BUCKET_BYTES[link.device.type])):
            tensors = {name: tensor.cpu().contiguous() for name, tensor in bucket}
            await asyncio.to_thread(save_file, tensors, folder / f"model-{number:05d}.safetensors")
        # It flushes its cache itself, and fails if it cannot.
        await _each(link, servers, "/update_weights_from_disk", {"model_path": str(folder)})
    finally:
        shutil.rmtree(folder)


# -- calls -------------------------------------------------------------------------------------------------------------


async def _begin(link: Link, server: Receiver) -> None:
    try:
        await _accepted(link, server, "/begin_weight_update", {})
    except Refused as refused:
        if "already open" not in str(refused):
            raise
        # By a trainer, or a sync, that died half-way. What it left is overwritten now.
        await _accepted(link, server, "/end_weight_update", {})
        await _accepted(link, server, "/begin_weight_update", {})


async def _each(link: Link, servers: Sequence[Receiver], path: str, body: object) -> list[Any]:
    return await _all(_accepted(link, server, path, body) for server in servers)


async def _checksums(link: Link, servers: Sequence[Receiver]) -> list[dict[tuple[int, str], str]]:
    """For each server, those of its tensors, by process and name."""
    answers = await _each(link, servers, "/weights_checker", {"action": "checksum"})
    return [
        {(rank, name): checksum for rank, part in enumerate(a["ranks"]) for name, checksum in part["checksums"].items()}
        for a in answers
    ]


async def _accepted(link: Link, server: Receiver, path: str, body: object) -> Any:
    answer = await call(link.client, server.url, path, body, link.timeout_s)
    if isinstance(answer, dict) and answer.get("success") is False:
        raise Refused(f"{server.url} refused {path}: {answer.get('message')}")
    return answer


async def _all(calls: Iterable[Awaitable[Any]]) -> list[Any]:
    """Their results, after all of them have ended. Of their errors that one is raised from which others may follow."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    errors = [result for result in results if isinstance(result, BaseException)]
    for error in sorted(errors, key=lambda error: not isinstance(error, Unreachable)):
        raise error
    return results
