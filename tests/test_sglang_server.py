"""The processes of an SGLang server: started, watched, ended, and none of them ever left behind.

Most tests launch `stand_in_server.py`, which starts at once and leaves what SGLang could leave; those marked `sglang`
launch SGLang.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from helpers import SMOLLM2

from negotiator.engines import sglang_server
from negotiator.engines.sglang_server import ServerSettings, SGLangServer, command, environment

ROOT = Path(__file__).parent.parent
SGLANG_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
CPU = ServerSettings(Path(sys.executable), SMOLLM2, dtype="float32", device="cpu")

TRAINER = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs the tests in the background ignores it
from negotiator.engines.sglang_server import ServerSettings, SGLangServer

python, model, log, plan = sys.argv[1:]
settings = ServerSettings(Path(python), Path(model), dtype="float32", device="cpu", max_total_tokens=4096)
server = SGLangServer.launch(settings, Path(log))
if plan != "leave while it starts":
    asyncio.run(server.wait_healthy(600, report=lambda line: None))
print(server.url, flush=True)
if plan == "raise":
    raise RuntimeError
if plan != "return":
    time.sleep(600)
"""


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment variable that every process started by a test inherits."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv("STARTED_BY_TEST", mark)
    monkeypatch.setenv("SPT_NOENV", "1")  # SGLang's processes name themselves, by default over their environment
    return mark


def started(mark: str) -> list[psutil.Process]:
    """The processes that a test has started and that have not ended, whosever children they are by now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("STARTED_BY_TEST") == mark:
                found.append(process)
    return found


def assert_gone(mark: str, limit_s: float) -> None:
    assert eventually(lambda: not started(mark), limit_s), f"left behind: {[p.cmdline() for p in started(mark)]}"


def eventually(holds: Callable[[], bool], limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str) -> Iterator[Callable[[str], SGLangServer]]:
    """Launches the stand-in with a behaviour; nothing of it outlives the test, even one that fails."""
    servers = []

    def launch(behaviour: str) -> SGLangServer:
        monkeypatch.setenv("STAND_IN", behaviour)
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        servers.append(SGLangServer.launch(stand_in_settings(tmp_path), tmp_path / "run" / "server.log"))
        return servers[-1]

    yield launch
    for server in servers:
        server.stop()
    for process in started(mark):
        process.kill()


def stand_in_settings(folder: Path) -> ServerSettings:
    """SGLang's interpreter is a script that ignores the module it is asked for."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n" + (Path(__file__).parent / "stand_in_server.py").read_text())
    python.chmod(0o755)
    return ServerSettings(python, SMOLLM2, dtype="float32", device="cpu")


def wait_healthy(server: SGLangServer, limit_s: float = 30) -> list[str]:
    """Returns what was reported meanwhile."""
    lines: list[str] = []
    asyncio.run(server.wait_healthy(limit_s, lines.append))
    return lines


def pid_of(server: SGLangServer) -> int:
    return int(httpx.get(server.url).text)


def test_a_server_answers_until_it_is_stopped(
    stand_in: Callable[[str], SGLangServer], mark: str, tmp_path: Path
) -> None:
    server = stand_in("runaway")
    wait_healthy(server)
    assert httpx.get(f"{server.url}/health").status_code == 200  # not while it still said 503
    assert server.alive()
    assert eventually(lambda: len(started(mark)) == 5, 5)  # guard, server, its child, one that left, and its child
    assert len(list(tmp_path.glob("negotiator-*/*-left-behind"))) == 1
    server.stop()
    assert not server.alive()
    assert server.obituary().endswith("stand-in ends")  # it was asked first
    assert started(mark) == []
    assert list(tmp_path.glob("negotiator-*")) == []
    server.stop()


def test_a_server_that_ignores_sigterm_is_killed(stand_in: Callable[[str], SGLangServer], mark: str) -> None:
    server = stand_in("stubborn")
    wait_healthy(server)
    server.stop()
    assert "SIGKILL" in server.obituary()
    assert started(mark) == []


def test_each_server_has_its_port_from_the_start(stand_in: Callable[[str], SGLangServer]) -> None:
    one, other = stand_in("silent"), stand_in("silent")
    assert one.url != other.url
    port = int(one.url.rpartition(":")[2])
    with socket.socket() as somebody, pytest.raises(OSError):
        somebody.bind(("127.0.0.1", port))
    one.stop()
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", port))


def test_death_is_noticed_and_explained(stand_in: Callable[[str], SGLangServer], mark: str) -> None:
    server = stand_in("runaway")
    wait_healthy(server)
    os.kill(pid_of(server), signal.SIGKILL)
    assert eventually(lambda: not server.alive(), 5)
    assert server.url in server.obituary()
    assert "SIGKILL" in server.obituary()
    assert server.obituary().endswith("stand-in starts")
    assert started(mark) == []  # its children have gone with it


def test_a_restarted_server_has_the_same_address(stand_in: Callable[[str], SGLangServer], mark: str) -> None:
    server = stand_in("")
    wait_healthy(server)
    url, first = server.url, pid_of(server)
    os.kill(first, signal.SIGKILL)
    assert eventually(lambda: not server.alive(), 5)
    server.restart()
    wait_healthy(server)
    assert (server.url, server.alive()) == (url, True)
    assert pid_of(server) != first
    server.restart()  # of one that still runs
    wait_healthy(server)
    assert len(started(mark)) == 3
    os.kill(pid_of(server), signal.SIGKILL)
    assert eventually(lambda: not server.alive(), 5)
    assert server.obituary().count("stand-in starts") == 1  # the log has three, its last words are the last life's
    assert server.log.read_text().count("stand-in starts") == 3


def test_waiting_ends_when_the_server_dies(stand_in: Callable[[str], SGLangServer]) -> None:
    server = stand_in("fails")
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"exit code 1(.|\n)*server\.log(.|\n)*no such model; exit$"):
        wait_healthy(server, limit_s=60)
    assert time.monotonic() - start < 30


def test_waiting_has_a_limit(stand_in: Callable[[str], SGLangServer], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_server, "REPORT_S", 0.5)
    server = stand_in("silent")
    lines: list[str] = []
    with pytest.raises(RuntimeError, match=r"did not answer /health within 3 s(.|\n)*stand-in starts"):
        asyncio.run(server.wait_healthy(3, lines.append))
    assert 3 <= len(lines) <= 6
    assert server.url in lines[0]
    assert "3 s" in lines[0]
    assert server.alive()  # whoever waited decides what becomes of it


def test_a_killed_guard_takes_the_server_along(stand_in: Callable[[str], SGLangServer], mark: str) -> None:
    server = stand_in("stubborn")
    wait_healthy(server)
    process = psutil.Process(pid_of(server))
    os.kill(process.ppid(), signal.SIGKILL)
    assert eventually(lambda: not server.alive(), 5)
    assert "SIGKILL" in server.obituary()
    assert eventually(lambda: process not in started(mark), 5)
    server.stop()  # ends what is left of the session
    assert_gone(mark, 5)


@pytest.mark.parametrize(
    "end",
    ["return", "raise", "leave while it starts", signal.SIGINT, signal.SIGTERM, signal.SIGKILL],
    ids=lambda end: end if isinstance(end, str) else end.name,
)
def test_nothing_outlives_the_trainer(end: str | signal.Signals, tmp_path: Path, mark: str) -> None:
    behaviour = "silent stubborn runaway" if end == "leave while it starts" else "runaway"
    plan = end if isinstance(end, str) else "wait"
    python = stand_in_settings(tmp_path).python
    with trainer(python, tmp_path, plan, STAND_IN=behaviour) as process:
        url = read_line(process)
        if end == "leave while it starts":
            assert eventually(lambda: len(started(mark)) == 6, 10)
            process.kill()
        if isinstance(end, signal.Signals):
            assert httpx.get(url).status_code == 200
            assert eventually(lambda: len(started(mark)) == 6, 10)
            process.send_signal(end)
        process.wait(10)
        assert_gone(mark, 15)


@contextlib.contextmanager
def trainer(python: Path, folder: Path, plan: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that launches a server, prints its address, and then does as planned."""
    arguments = [sys.executable, "-c", TRAINER, str(python), str(SMOLLM2), str(folder / "server.log"), plan]
    process = subprocess.Popen(
        arguments, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def read_line(process: subprocess.Popen[bytes], limit_s: float = 600) -> str:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], limit_s)[0], f"the trainer printed nothing within {limit_s} s"
    return process.stdout.readline().decode().strip()


def test_the_trainer_imports_neither_torch_nor_sglang_for_it() -> None:
    code = "import sys, negotiator.engines.sglang_server; sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command_and_environment() -> None:
    on_gpus = ServerSettings(
        Path(sys.executable),
        Path("model"),
        dtype="bfloat16",
        device="cuda",
        gpus=(1, 3),
        max_total_tokens=5000,
        max_running=7,
        prefill_tokens=512,
        memory_saver=True,
    )
    words = " ".join(command(on_gpus, 1234))
    start = f"{sys.executable} -P -m sglang.launch_server --model-path model --host 127.0.0.1 --port 1234"
    assert words.startswith(start)
    for option in (
        *("--device cuda", "--dtype bfloat16", "--max-total-tokens 5000", "--max-running-requests 7", "--tp-size 2"),
        *("--chunked-prefill-size 512", "--enable-memory-saver"),
        "--enable-deterministic-inference",
    ):
        assert option in words
    on_cpu = " ".join(command(CPU, 1234))
    assert "-m sglang_cpu " in on_cpu
    assert "--attention-backend torch_native" in on_cpu
    assert "None" not in on_cpu
    assert "tp-size" not in on_cpu

    trainers = {"HOME": "/home", "RANK": "1", "MASTER_PORT": "29500", "TRITON_INTERPRET": "1", "PYTHONPATH": "kernels"}
    assert environment(on_gpus, trainers) == {"HOME": "/home", "CUDA_VISIBLE_DEVICES": "1,3"}
    trainers["CUDA_VISIBLE_DEVICES"] = "4,5,6,GPU-8"
    assert environment(on_gpus, trainers)["CUDA_VISIBLE_DEVICES"] == "5,GPU-8"
    with pytest.raises(ValueError, match="GPU 3 is not one of CUDA_VISIBLE_DEVICES=4,5,6,"):
        environment(on_gpus, {"CUDA_VISIBLE_DEVICES": "4,5,6"})
    assert environment(CPU, {"HOME": "/home"}) == {"HOME": "/home", "OMP_WAIT_POLICY": "PASSIVE"}
    assert environment(CPU, {"OMP_WAIT_POLICY": "ACTIVE"}) == {"OMP_WAIT_POLICY": "ACTIVE"}


def test_settings_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make sglang"):
        ServerSettings(tmp_path / "python", SMOLLM2, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="GPUs"):
        ServerSettings(Path(sys.executable), SMOLLM2, dtype="float32", device="cpu", gpus=(0,))
    with pytest.raises(ValueError, match="GPUs"):
        ServerSettings(Path(sys.executable), SMOLLM2, dtype="float32", device="cuda")


needs_sglang = pytest.mark.skipif(not SGLANG_PYTHON.exists(), reason="no .venv-sglang here: make sglang")


@pytest.mark.sglang
@needs_sglang
def test_the_hash_behind_seeds_is_murmur3() -> None:
    rng = random.Random(0)
    seeds = [0, 1, 2**63 - 1, rng.getrandbits(63)]
    positions = [0, 5, 2**31 - 1, rng.getrandbits(20)]
    columns = [0, 1, 49151, 2**31 - 1]
    code = (
        "import torch, sglang_cpu; "
        f"h = sglang_cpu.murmur_hash32(torch.tensor({seeds}), torch.tensor({positions}), torch.tensor({columns})); "
        "print(h.flatten().tolist())"
    )
    printed = subprocess.run([SGLANG_PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout
    expected = [
        murmur3(seed.to_bytes(8, "little") + position.to_bytes(4, "little") + column.to_bytes(4, "little"))
        for seed, position in zip(seeds, positions, strict=True)
        for column in columns
    ]
    assert printed.splitlines()[-1] == str(expected)


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0 of a whole number of words."""
    h = 0
    for i in range(0, len(data), 4):
        k = int.from_bytes(data[i : i + 4], "little") * 0xCC9E2D51 % 2**32
        k = rotated(k, 15) * 0x1B873593 % 2**32
        h = (rotated(h ^ k, 13) * 5 + 0xE6546B64) % 2**32
    h ^= len(data)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        h = (h ^ h >> shift) * factor % 2**32
    return h ^ h >> 16


def rotated(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) % 2**32
