"""An SGLang server that belongs to the trainer: launched, watched, restarted, and never left behind.

It runs in SGLang's own environment, so nothing of SGLang is imported here. `guard.py` stands between the two processes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from negotiator.engines import guard

HOST = "127.0.0.1"
POLL_S = 0.2  # between two looks at a server that starts
REPORT_S = 10.0  # between two lines about one
KILL_LIMIT_S = 60.0  # for a killed server's processes to be gone; a GPU's memory is given back meanwhile
TAIL_LINES = 20  # of the log, in an error

# Set for the trainer by torchrun, its user, its tests and its own environment, and wrong for the server.
_NOT_FOR_THE_SERVER = (
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("TORCHELASTIC_USE_AGENT_STORE", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"),
    *("TRITON_INTERPRET", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"),
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    python: Path  # interpreter of SGLang's environment
    model: Path
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "cuda"]
    gpus: tuple[int, ...] = ()  # cuda: as the trainer counts them; the model is spread over all of them
    max_total_tokens: int | None = None  # whose keys and values fit in the cache; None: what memory allows
    max_running: int | None = None  # requests that decode together
    prefill_tokens: int | None = None  # most prompt tokens in one forward pass
    memory_saver: bool = False  # cuda: the GPU's memory can be released to the trainer and taken back

    def __post_init__(self) -> None:
        if not os.access(self.python, os.X_OK) or not self.python.is_file():
            raise ValueError(f"{self.python} is not an interpreter: `make sglang` makes an environment with SGLang")
        if (self.device == "cuda") != bool(self.gpus):
            raise ValueError(f"a server on {self.device} cannot compute on GPUs {list(self.gpus)}")


def command(settings: ServerSettings, port: int) -> list[str]:
    """The command line of SGLang's server."""
    options: dict[str, object] = {
        "model-path": settings.model,
        "host": HOST,
        "port": port,
        "device": settings.device,
        "dtype": settings.dtype,
        "grammar-backend": "none",  # for constrained output, which nobody asks for
        "max-total-tokens": settings.max_total_tokens,
        "max-running-requests": settings.max_running,
        "chunked-prefill-size": settings.prefill_tokens,
        "tp-size": len(settings.gpus) or None,
    }
    # Without the deterministic mode SGLang ignores the seeds of requests.
    switches = ["skip-server-warmup", "enable-deterministic-inference", "sleep-on-idle"]
    if settings.memory_saver:
        switches.append("enable-memory-saver")
    module = "sglang.launch_server"
    if settings.device == "cpu":
        module = "sglang_cpu"  # scripts/sglang_cpu.py, put into the environment by `make sglang`
        options |= {"attention-backend": "torch_native", "sampling-backend": "pytorch"}
        switches.append("disable-overlap-schedule")
    given = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    # -P: the trainer's working directory is not for SGLang to import from.
    return [str(settings.python), "-P", "-m", module, *given, *(f"--{switch}" for switch in switches)]


def environment(settings: ServerSettings, trainers: Mapping[str, str]) -> dict[str, str]:
    """The server's environment variables, made from the trainer's. ValueError if that does not see its GPUs."""
    result = {name: value for name, value in trainers.items() if name not in _NOT_FOR_THE_SERVER}
    if settings.gpus:
        visible = trainers.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(i) for i in range(max(settings.gpus) + 1)]
        if max(settings.gpus) >= len(names):
            raise ValueError(f"GPU {max(settings.gpus)} is not one of CUDA_VISIBLE_DEVICES={visible}, counted from 0")
        result["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in settings.gpus)
    else:
        result.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads would take the trainer's cores
    return result


class SGLangServer:
    """One server, from `launch` to `stop`. It also ends when the trainer does, however that ends."""

    @classmethod
    def launch(cls, settings: ServerSettings, log: Path) -> SGLangServer:
        """Starts a server, without waiting for it to answer. What it prints is appended to `log`."""
        server = cls(settings, log)
        server._start()
        return server

    def __init__(self, settings: ServerSettings, log: Path) -> None:
        self._settings = settings
        self.log = log
        # Bound as long as the server may run, so that nobody else is given the port, and not listening, so that the
        # server can. Reusable only now: the system hands out ports that are reusable more than once.
        self._port = socket.socket()
        self._port.bind((HOST, 0))
        self._port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port = self._port.getsockname()[1]
        self.url = f"http://{HOST}:{port}"
        self._command = [sys.executable, "-P", guard.__file__, str(os.getpid()), *command(settings, port)]

    def _start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as output:
            self._log_start = output.tell()
            output.write(f"{' '.join(self._command)}\n".encode())
            output.flush()
            self._process = subprocess.Popen(
                self._command,
                env=environment(self._settings, os.environ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the trainer, which then stops the server
            )

    def alive(self) -> bool:
        return self._process.poll() is None

    def obituary(self) -> str:
        """Of what a server that is not alive died."""
        code = self._process.returncode
        assert code is not None, "the server is alive"
        number = -code if code < 0 else code - 128
        how = f"signal {signal.Signals(number).name}" if number > 0 else f"exit code {code}"
        return f"the SGLang server {self.url} ended with {how}; {self._last_words()}"

    async def wait_healthy(self, limit_s: float, report: Callable[[str], None]) -> None:
        """Waits until it answers; `report` gets a line now and then. Raises RuntimeError if it dies or is too slow."""
        start = reported = time.monotonic()
        async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
            while not await _is_healthy(client, self.url):
                if not self.alive():
                    raise RuntimeError(self.obituary())
                now = time.monotonic()
                if now - start > limit_s:
                    raise RuntimeError(
                        f"the SGLang server {self.url} did not answer /health within {limit_s:.0f} s; "
                        f"{self._last_words()}"
                    )
                if now - reported > REPORT_S:
                    reported = now
                    report(f"SGLang at {self.url} is starting: {now - start:.0f} s of at most {limit_s:.0f} s")
                await asyncio.sleep(POLL_S)

    def restart(self) -> None:
        """Ends what is left of it and starts it anew under the same address, without waiting for it to answer."""
        self._end()
        self._start()

    def stop(self) -> None:
        """Ends it; returns when none of its processes is left."""
        self._end()
        self._port.close()

    def _end(self) -> None:
        self._process.terminate()  # nothing happens if it has ended
        try:
            self._process.wait(guard.GRACE_S + KILL_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"processes of the SGLang server {self.url} were not gone {KILL_LIMIT_S:.0f} s after SIGKILL"
            ) from None
        if self._process.returncode < 0:  # the guard itself was killed, and its session may be left
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def _last_words(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self._log_start)
            lines = file.read().decode(errors="replace").splitlines()
        return f"the end of {self.log}:\n" + "\n".join(line[:300] for line in lines[-TAIL_LINES:])


async def _is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        response = await client.get(f"{url}/health")
    except httpx.TransportError:
        return False
    return response.status_code == 200
