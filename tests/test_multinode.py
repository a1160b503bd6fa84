"""The recipes for several machines: two of them here, each in a network namespace of its own where that is allowed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from tiny_run import PATIENCE_S, metrics
from torch.distributed import run as distributed_run

ROOT = Path(__file__).parent.parent
# On the PATH in place of Slurm's: a job step is the command once for each node, and gets the signals that srun gets.
SRUN = """#!/usr/bin/env bash
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do "$@" & nodes+=($!); done
for name in USR1 TERM; do trap "kill -$name \\${nodes[*]}; signalled=yes" $name; done
touch "$ASKED.waits"
for node in "${nodes[@]}"; do
    while signalled=; wait $node; code=$?; [[ $signalled ]]; do :; done
    ((code > worst)) && worst=$code
done
exit $((worst))
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$CALLED"; fi
"""
# In place of Python: says what it was asked for, and ends as told, at once or with a signal.
STAND_IN = """#!/usr/bin/env bash
trap 'exit 1' USR1 TERM
printf '%s\\n' "$@" > "$ASKED"
[[ $END == wait ]] || exit "$END"
while :; do sleep 0.01; done
"""


@contextmanager
def two_machines() -> Iterator[tuple[list[list[str]], str, dict[str, str]]]:
    """What to put before a command to run it on each, the first one's address, and variables that lead there."""
    names, cards = [f"negotiator-{os.getpid()}-{n}" for n in (0, 1)], [f"n{os.getpid()}-{n}" for n in (0, 1)]
    commands = [f"link add {cards[0]} type veth peer name {cards[1]}"]
    for number, (name, card) in enumerate(zip(names, cards, strict=True)):
        commands += [f"netns add {name}", f"link set {card} netns {name}"]
        commands += [f"-n {name} addr add 10.83.0.{number + 1}/24 dev {card}", f"-n {name} link set {card} name train0"]
        commands += [f"-n {name} link set train0 up", f"-n {name} link set lo up"]
    try:
        done = all(subprocess.run(["ip", *c.split()], capture_output=True).returncode == 0 for c in commands)
    except FileNotFoundError:
        done = False
    try:
        if done:
            variables = {"GLOO_SOCKET_IFNAME": "train0"}
            yield [["ip", "netns", "exec", name] for name in names], "10.83.0.1", variables
        else:
            yield [[], []], f"localhost:{free_port()}", {}
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def begin(command: Sequence[object], output: Path, **variables: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHON": sys.executable, **{name: str(value) for name, value in variables.items()}}
    with output.open("w") as file:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=file, stderr=file)


def wait_for(condition, processes: Sequence[subprocess.Popen[bytes]], outputs: Sequence[Path]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        said = [output.read_text() for output in outputs]
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), said
        time.sleep(0.01)


def test_two_machines_with_two_processes_each_stop_and_save_together(config_file, tmp_path):
    outputs, folder = [tmp_path / "0.txt", tmp_path / "1.txt"], tmp_path / "both"
    arguments = ["--config", config_file, "--runs", tmp_path, "--name", "both", "--steps", 1000]
    with two_machines() as (prefixes, master, variables):
        agents = [
            begin([*prefix, "scripts/multinode.sh", 2, n, master, *arguments], outputs[n], PROCESSES=2, **variables)
            for n, prefix in enumerate(prefixes)
        ]
        try:
            wait_for(lambda: metrics(folder), agents, outputs)
            agents[1].send_signal(signal.SIGUSR1)  # as `ip netns exec` becomes the script, and the script torchrun
            assert [agent.wait(PATIENCE_S) for agent in agents] == [1, 1]
        finally:
            for agent in agents:
                agent.kill()
    said = [output.read_text() for output in outputs]
    assert "4 process(es) on cpu" in said[0]
    assert f"SIGUSR1: stopped and saved; go on with: python -m negotiator.train --resume {folder}" in said[0]
    assert "exitcode  : 138" in said[0]
    assert "process(es)" not in said[1]
    assert (folder / "checkpoints" / f"step-{len(metrics(folder))}").exists()


@pytest.fixture
def slurm(tmp_path):
    """Starts scripts/slurm.sh as Slurm would, for two nodes of one GPU."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("stand-in", STAND_IN)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    given = {"SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_GPUS_ON_NODE": 1}
    given |= {"SLURM_JOB_ID": os.getpid(), "RUNS": tmp_path / "runs", "PATH": f"{commands}:{os.environ['PATH']}"}
    given |= {"CALLED": tmp_path / "called", "ASKED": tmp_path / "asked", "PYTHON": commands / "stand-in"}

    def start(*arguments: object, **variables: object) -> subprocess.Popen[bytes]:
        return begin(["scripts/slurm.sh", *arguments], tmp_path / "said.txt", **given, **variables)

    return start


def arguments_of(asked: Path) -> list[str]:
    """The trainer's; torchrun's are checked by itself."""
    arguments = distributed_run.parse_args(asked.read_text().splitlines()[2:])
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.rdzv_backend) == ("2", "1", "c10d")
    assert arguments.rdzv_endpoint.startswith("localhost:")
    assert "SIGUSR1" in arguments.signals_to_handle
    assert (arguments.module, arguments.training_script) == (True, "negotiator.train")
    return list(arguments.training_script_args)


def test_slurm_gets_a_job_back_that_was_stopped_before_its_end(tmp_path, slurm):
    said, called, asked = (tmp_path / name for name in ("said.txt", "called", "asked"))
    folder = tmp_path / "runs" / f"slurm-{os.getpid()}"
    job = slurm("--config", "some.yaml", END="wait")
    try:
        wait_for((tmp_path / "asked.waits").exists, [job], [said])
        job.send_signal(signal.SIGUSR1)
        assert job.wait(PATIENCE_S) == 138, said.read_text()
    finally:
        job.kill()
    assert called.read_text() == f"requeue {os.getpid()}\n"
    assert arguments_of(asked) == ["--config", "some.yaml", "--runs", str(folder.parent), "--name", folder.name]

    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert slurm("--config", "some.yaml", END=0).wait(PATIENCE_S) == 0, said.read_text()
    assert arguments_of(asked) == ["--resume", str(folder)]
    assert called.read_text().count("\n") == 1


@pytest.mark.parametrize("sent, end, code", [(signal.SIGTERM, "wait", 143), (None, 1, 1)])
def test_slurm_does_not_repeat_a_job_that_failed_or_was_cancelled(tmp_path, slurm, sent, end, code):
    said = tmp_path / "said.txt"
    job = slurm("--config", "some.yaml", END=end)
    try:
        if sent:
            wait_for((tmp_path / "asked.waits").exists, [job], [said])
            job.send_signal(sent)
        assert job.wait(PATIENCE_S) == code, said.read_text()
    finally:
        job.kill()
    assert not (tmp_path / "called").exists()
