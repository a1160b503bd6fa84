"""Whole runs on a tiny model, in processes that are forked from one which has imported everything already.

The model is random (its dialogues are gibberish), the tokenizer and chat template are SmolLM2's.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch
import yaml
from helpers import SMOLLM2
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["negotiator.train"])
PATIENCE_S = 120


def write_model(folder: Path) -> None:
    """Random weights small enough that its next token is nearly uniform: agreement and scores then vary by chance."""
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.3,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_config(file: Path, model: Path) -> None:
    config = {
        "steps": 5,
        "model": {"path": str(model), "dtype": "fp32", "device": "cpu"},
        "dialogue": {"max_rounds": 2, "max_tokens": 12, "completion_max_tokens": 12},
        "rollout": {"scenarios": 2, "group_size": 3},
        "engine": {"cache_tokens": 4096},
        "judge": {"agreement": "local", "reward": "local"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "micro_batch_tokens": 1024},
        "evaluation": {"every": 2, "scenarios": 3},
        "checkpoint": {"every": 2, "keep": 2},
    }
    file.write_text(yaml.safe_dump(config))


class Together:
    """Processes that run `function(*arguments)` together, in the order of their ranks; each prints to a file."""

    def __init__(self, function: Callable[..., int], arguments: Sequence[Sequence[object]], folder: Path) -> None:
        """One tuple of arguments a process. `folder`: for what they print."""
        folder.mkdir(parents=True, exist_ok=True)
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        self.outputs = [folder / f"{rank}.txt" for rank in range(len(arguments))]
        self.processes: list[ForkServerProcess] = []
        for rank, own in enumerate(arguments):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(arguments)}
            world |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            started = FORKS.Process(target=_enter, args=(world, self.outputs[rank], function, own))
            started.start()
            self.processes.append(started)

    def printed(self, rank: int = 0) -> str:
        return self.outputs[rank].read_text()

    def wait(self) -> list[int | None]:
        """Their exit codes."""
        for process in self.processes:
            process.join(PATIENCE_S)
            assert process.exitcode is not None, f"still running: {[output.read_text() for output in self.outputs]}"
        return [process.exitcode for process in self.processes]

    def signal(self, rank: int, number: int) -> None:
        os.kill(self.processes[rank].pid or 0, number)

    def wait_for_steps(self, folder: Path, steps: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (folder / "config.yaml").exists() or len(metrics(folder)) < steps:
            assert all(process.is_alive() for process in self.processes), self.printed()
            assert time.monotonic() < deadline, "the run got no further"
            time.sleep(0.005)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        self.wait()


def metrics(folder: Path) -> list[dict]:
    """Without what depends on the clock; nothing of a line that is being written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: row[name] for name in row if name not in ("seconds", "tokens_per_s")} for row in rows]


def _enter(world: dict[str, object], output: Path, function: Callable[..., int], arguments: Sequence[object]) -> None:
    os.environ.update({name: str(value) for name, value in world.items()})
    if world["WORLD_SIZE"] != 1:
        torch.set_num_threads(1)  # as torchrun does
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = open(file, "w", buffering=1)  # noqa: SIM115 - until the process ends
    sys.exit(function(*arguments))
