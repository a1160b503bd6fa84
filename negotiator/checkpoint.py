"""Checkpoints: a Hugging Face folder plus what the trainer needs to go on exactly where it was.

    best -> step-N                                         the one whose evaluation was best (config.evaluation)
    step-N/config.json, model.safetensors, tokenizer ...   the model after N steps, as `from_pretrained` reads it;
                                                           with LoRA the adapter, as peft reads it
           trainer/shard-R-model-F-of-M.safetensors        fp32 masters and AdamW moments, what process R held of them
           trainer.json                                    steps done, AdamW updates done

`trainer/` is written and read by torch.distributed.checkpoint, the same way by one process and by many, so a run may go
on with another number of processes. Its files are safetensors (`HuggingFaceStorageWriter`), not its default format,
whose index is a pickle; torch 2.11 to 2.13 write them alike. Every random number of a run is derived from (seed, step,
...), so there is no generator state to keep. All processes must see the folder.

A step waits while tensors are copied to the CPU's memory; a thread then writes the files while the next steps are done.
`step-N/` appears by one rename when all files of all processes are on the disk, and older ones are dropped after that:
a kill or a full disk costs the checkpoint that was being written and no other. Such a failure ends the run at its next
step. A run that went on would spend hours that it cannot keep; and a full disk stops its metrics as well.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from negotiator.learner import Learner
from negotiator.lora import save_adapter

FILE_BYTES = 2**30  # about the size of a file in `trainer/`; a writer holds one in memory a second time

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none of it


class Checkpoints:
    """Writes the checkpoints of a run, one at a time. All processes make the same calls, in a `with` block.

    A checkpoint that could not be written is reported by the next call, or by the end of the block: RuntimeError.
    """

    def __init__(
        self, folder: Path, learner: Learner, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, keep: int
    ) -> None:
        """`dtype`: of the exported model. `keep`: how many of the newest stay."""
        self._folder, self._keep = folder, keep
        self._learner, self._tokenizer, self._dtype = learner, tokenizer, dtype
        # The thread's collectives must not meet those of the step that is done meanwhile.
        self._group = dist.new_group(backend="gloo") if learner.world.size > 1 else None
        # Not the public DefaultStager around it, which torch 2.11 and 2.12 close after its first use (pytorch #183413).
        self._stager = StateDictStager(pin_memory=learner.model.device.type == "cuda")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.newest_step = 0  # of those that were begun

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except RuntimeError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._thread.shutdown()
            self._stager.close()

    def save(self, steps_done: int, best: bool = False) -> None:
        """Returns when everything is copied; `folder/step-<steps_done>` appears later, and is `folder/best` then."""
        self.wait()
        self.newest_step = steps_done
        partial = self._folder / f"step-{steps_done}.partial"
        if self._learner.world.leads:
            for stale in self._folder.glob("*.partial"):
                shutil.rmtree(stale)
            partial.mkdir(parents=True)
        write_export = begin_export(self._learner, self._dtype, partial)
        state, updates = _trainer_state(self._learner)
        staged = self._stager.stage(state, non_blocking=True)
        if self._learner.model.device.type == "cuda":
            torch.cuda.synchronize()
        about = {"steps_done": steps_done, "updates": updates}
        self._writing = self._thread.submit(self._write, partial, staged, write_export, about, best)

    def check(self) -> None:
        """Raises if the checkpoint under way has failed; does not wait for it."""
        if self._writing and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint under way is complete."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    def _write(
        self,
        partial: Path,
        state: dict[str, torch.Tensor],
        write_export: Callable[[], None],
        about: dict[str, int],
        best: bool,
    ) -> None:
        leads, failure, cause = self._learner.world.leads, "", None
        try:
            files = _file_numbers(state, self._learner.world.size)
            writer = HuggingFaceStorageWriter(str(partial / "trainer"), files, save_distributed=True)
            save(state, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            if leads:  # all processes have written their files
                self._complete(partial, write_export, about, best)
        except BaseException as error:  # CheckpointException is no Exception
            failure, cause = _reason(error), error
            if leads:
                shutil.rmtree(partial, ignore_errors=True)  # a full disk needs its room
        if self._group:  # nobody takes it for complete, and ends, before the leader is done
            told = [failure]
            dist.broadcast_object_list(told, group=self._group)
            failure = told[0]
        if failure:
            whole = newest(self._folder)
            raise RuntimeError(
                f"the checkpoint of step {about['steps_done']} was not written ({failure}); "
                f"the newest whole one is {whole[1] if whole else 'none'}"
            ) from cause

    def _complete(self, partial: Path, write_export: Callable[[], None], about: dict[str, int], best: bool) -> None:
        write_export()
        self._tokenizer.save_pretrained(partial)
        (partial / "trainer.json").write_text(json.dumps(about) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        partial.rename(partial.with_suffix(""))
        link = self._folder / "best"
        if best:
            new = self._folder / "best.new"
            new.unlink(missing_ok=True)
            new.symlink_to(partial.stem)
            new.rename(link)
        _flush(self._folder)
        for _, old in _all(self._folder)[: -self._keep]:
            if old.name != (link.readlink().name if link.is_symlink() else None):
                shutil.rmtree(old.rename(old.with_suffix(".partial")))  # half of it must not look like a checkpoint


def begin_export(learner: Learner, dtype: torch.dtype, folder: Path) -> Callable[[], None]:
    """Copies the model as it is now to the leader's CPU, in `dtype`; what it returns writes it to `folder`."""
    leads, model, export = learner.world.leads, learner.model, {}
    if learner.adapted:
        if leads:
            save_adapter(model, folder)  # at once, as it is small
        return lambda: None
    shell = _without_weights(model, dtype)
    for name, tensor in learner.weights():  # which all processes go through together
        if leads:
            export[name] = tensor.detach().to("cpu", dtype, copy=True)
    buffers = shell.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    export |= {name: model.get_buffer(name).to("cpu", copy=True) for name in buffers}
    return functools.partial(shell.save_pretrained, folder, state_dict=export)


def newest(folder: Path) -> tuple[int, Path] | None:
    """(steps done, path) of the newest whole checkpoint, or None."""
    return _all(folder)[-1] if _all(folder) else None


def load_trainer(path: Path, learner: Learner) -> None:
    """Restores masters and optimizer, and the parameters that are rounded masters. All processes call it together.

    Raises ValueError if the checkpoint belongs to another model, or if a process does not see all of it.
    """
    about = json.loads((path / "trainer.json").read_text())
    reader = HuggingFaceStorageReader(str(path / "trainer"))
    saved = reader.read_metadata().state_dict_metadata
    state = {f"master.{name}": master.detach() for name, master in learner.masters.items()}
    for name, master in learner.masters.items():
        if f"exp_avg.{name}" in saved:
            moments = {part: torch.zeros_like(master) for part in ("exp_avg", "exp_avg_sq")}
            count = torch.tensor(float(about["updates"]), device=master.device)
            learner.optimizer.state[master] = {"step": count, **moments}
            state |= {f"{part}.{name}": moment for part, moment in moments.items()}
    for name, tensor in state.items():
        held = saved.get(name)
        if not isinstance(held, TensorStorageMetadata) or held.size != tensor.shape:
            raise ValueError(f"{path} was saved for another model: its {name} is missing or of another shape")
        # torch.distributed.checkpoint would leave the gap as it is.
        if sum(chunk.sizes.numel() for chunk in held.chunks) != tensor.numel():
            raise ValueError(f"{path} lacks parts of {name}: all files that its processes wrote must be there")
    load(state, storage_reader=reader, no_dist=learner.world.size == 1)
    with torch.no_grad():
        parameters = dict(learner.model.named_parameters())
        for name, master in learner.masters.items():
            if parameters[name] is not master:
                parameters[name].copy_(master)


def _trainer_state(learner: Learner) -> tuple[dict[str, torch.Tensor], int]:
    """Masters and moments by name, and how many updates AdamW has made, which is one number for all of them."""
    state, updates = {}, 0
    for name, master in learner.masters.items():
        state[f"master.{name}"] = master.detach()
        if moments := learner.optimizer.state.get(master):
            state |= {f"{part}.{name}": moments[part] for part in ("exp_avg", "exp_avg_sq")}
            updates = moments["step"]
    return state, int(updates)


def _without_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """What writes the export: the model itself may be sharded, in another precision, and in use."""
    with torch.device("meta"):
        shell: Any = type(model)(copy.deepcopy(model.config))
        shell.to(dtype)
    shell.generation_config = model.generation_config
    whole: PreTrainedModel = shell
    return whole


def _file_numbers(state: dict[str, torch.Tensor], writers: int) -> dict[str, int]:
    """For each tensor the file that it goes to, from 1, the same for every process."""
    numbers, total = {}, 0
    for name, tensor in state.items():
        numbers[name] = 1 + total // FILE_BYTES
        total += tensor.numel() * tensor.element_size() // writers
    return numbers


def _reason(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"process {rank}: {failure}" for rank, (failure, _) in error.failures.items())


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := re.fullmatch(r"step-(\d+)", path.name))]
    return sorted(found)


def _flush(path: Path) -> None:
    """Makes a file, or a folder's list of names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
