"""The SGLang servers behind an engine: which of them serve the current weights, and how the others get back to that.

A server is ready while it is known to serve the current version. One that did not answer, or answered nonsense, is
down until it generates again and has been given the current weights; one of our own that does not generate is
restarted. One that is not back within the time limit is lost until the next weights, when it gets another chance.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import torch

from negotiator.config import EngineConfig
from negotiator.engines.sglang_http import Unreachable, call
from negotiator.engines.sglang_server import ServerSettings, SGLangServer
from negotiator.engines.weight_sync import Link, Receiver, Weights, choose_way, prove, push

PROVE_EVERY = 100  # syncs after which it is proven anew that weights arrive whole
HEALTH_S = 30.0  # for a server to generate one token
POLL_S = 1.0  # between two tries to bring a server back

log = logging.getLogger("negotiator")


@dataclasses.dataclass(eq=False, slots=True)
class Server:
    settings: ServerSettings | None  # of one of our own
    url: str = ""  # of one of our own: from its start on
    process: SGLangServer | None = None  # likewise
    tp_size: int = 1
    version: int | None = None  # of the weights it serves; None while it is down
    repair: asyncio.Task[None] | None = None  # what brings it back
    lost: str | None = None  # why it will not come back
    released: bool = False  # its memory is the trainer's for now
    running: int = 0  # requests
    warmed: dict[tuple[int, ...], asyncio.Task[Any]] = dataclasses.field(default_factory=dict)  # prefixes it caches

    @property
    def receiver(self) -> Receiver:
        return Receiver(self.url, self.tp_size)


class Fleet:
    """`servers`: settings of the trainer's own, whose logs go to the folder `logs`, or URLs of others.

    `same_gpu`: all of them compute on the GPU that holds the trainer's weights.
    """

    def __init__(
        self,
        servers: Sequence[ServerSettings | str],
        config: EngineConfig,
        logs: Path,
        client: httpx.AsyncClient,
        same_gpu: bool,
    ) -> None:
        self.servers = [Server(None, url=s.rstrip("/")) if isinstance(s, str) else Server(s) for s in servers]
        self.version = -1
        self._config = config
        self._logs = logs
        self._client = client
        self._same_gpu = same_gpu
        self._weights: Weights = ()
        self._stamp = 0  # of the weights as they were when they became current
        self._syncs = 0
        self._serving = False  # new weights are on their way
        self._news = asyncio.Event()  # set whenever a server may have become ready, or lost
        self._link: Link | None = None

    @property
    def ready(self) -> list[Server]:
        return [server for server in self.servers if server.version == self.version]

    async def start(self, device: torch.device) -> None:
        """Starts our own servers, asks all what they are, and chooses how weights get there from `device`."""
        limit = self._config.recovery_timeout_s
        for number, server in enumerate(self.servers):
            if server.settings is not None:
                server.process = SGLangServer.launch(server.settings, self._logs / f"sglang-{number}.log")
                server.url = server.process.url
        for server in self.servers:
            if server.process is not None:
                await server.process.wait_healthy(limit, log.info)
            info = await call(self._client, server.url, "/server_info", None, limit)
            server.tp_size = info["tp_size"]
            if not info["enable_deterministic_inference"]:
                log.warning("%s ignores seeds: start it with --enable-deterministic-inference", server.url)
        way, why = choose_way(self._config.sync, device, self._same_gpu)
        log.info("weights reach %d SGLang server(s) by way of %s: %s", len(self.servers), way, why)
        self._link = Link(self._client, way, device, self._config.sync_folder, limit)

    async def serve(self, weights: Weights, version: int) -> None:
        """Makes every server serve new weights. Nothing may be running."""
        self.version, self._weights, self._stamp = version, weights, _stamp(weights)
        for server in self.servers:
            server.version = None
            server.warmed.clear()
            if server.lost is not None:
                self._bring_back(server, server.lost)
        self._serving = True
        try:
            await self._sync([server for server in self.servers if server.repair is None])
        finally:
            self._serving = False
            self._news.set()
        await self.one_is_ready()

    async def _sync(self, servers: list[Server]) -> None:
        """Gives `servers` the current weights. One that goes down meanwhile is brought back alone."""
        assert self._link is not None, "start comes first"
        while servers:
            receivers = [server.receiver for server in servers]
            try:
                await self._resume(servers)
                await push(self._link, receivers, self._weights, self.version)
                if self._syncs % PROVE_EVERY == 0:
                    await prove(self._link, receivers, self._weights, self.version)
                break
            except Unreachable as failure:
                (down,) = [server for server in servers if server.url == failure.url]
                servers.remove(down)
                self._bring_back(down, str(failure))
        self._syncs += 1
        for server in servers:
            server.version = self.version

    async def release(self) -> None:
        """Servers of our own on the trainer's GPU lend it their memory until the next `serve`. Nothing may run."""
        limit = self._config.request_timeout_s
        for server in self.ready:
            if server.settings is not None and server.settings.memory_saver:
                try:
                    await call(self._client, server.url, "/release_memory_occupation", {}, limit)
                except Unreachable as failure:
                    self.goes_down(server, str(failure))
                else:
                    server.version, server.released = None, True  # its weights are gone
                    server.warmed.clear()

    async def _resume(self, servers: Sequence[Server]) -> None:
        for server in servers:
            if server.released:
                torch.cuda.empty_cache()  # what the trainer has freed is still in its own reserve
                await call(self._client, server.url, "/resume_memory_occupation", {}, self._config.request_timeout_s)
                server.released = False

    def goes_down(self, server: Server, why: str) -> None:
        """To be called by whoever got no sensible answer from a server that was ready."""
        if server.version is not None:  # else somebody else has noticed
            server.version = None
            server.warmed.clear()
            self._bring_back(server, why)

    async def one_is_ready(self) -> None:
        """Waits for it. Raises RuntimeError if all servers are lost."""
        while not self.ready:
            if not self._serving and all(server.repair is None for server in self.servers):
                lost = [server.lost or f"{server.url} did not take the weights" for server in self.servers]
                raise RuntimeError(f"no SGLang server is left: {'; '.join(lost)}")
            self._news.clear()
            await self._news.wait()

    async def close(self) -> None:
        """Stops the trainer's own servers. Others go on, with the weights they have."""
        tasks = [server.repair for server in self.servers if server.repair is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for server in self.servers:
            if server.process is not None:
                await asyncio.to_thread(server.process.stop)

    def _bring_back(self, server: Server, why: str) -> None:
        log.warning("an SGLang server is down; %s", why)
        server.lost = None
        server.repair = asyncio.create_task(self._repair(server, why))

    async def _repair(self, server: Server, why: str) -> None:
        started, limit = time.monotonic(), self._config.recovery_timeout_s
        try:
            async with asyncio.timeout(limit):
                while not await self._try_to_repair(server):
                    await asyncio.sleep(POLL_S)
            log.info("the SGLang server %s is back after %.0f s", server.url, time.monotonic() - started)
        except TimeoutError:
            server.lost = f"an SGLang server was not back within {limit:g} s; {why}"
        except (RuntimeError, ValueError) as error:  # it died again, or refuses the weights
            server.lost = f"an SGLang server did not come back: {error}"
        if server.lost is not None:
            log.warning("%s", server.lost)
        server.repair = None
        self._news.set()

    async def _try_to_repair(self, server: Server) -> bool:
        assert self._link is not None
        try:
            if server.released or not await self._generates(server):
                if server.process is None:
                    return False
                log.info("restarting the SGLang server %s", server.url)
                await asyncio.to_thread(server.process.restart)
                server.released = False
                await server.process.wait_healthy(self._config.recovery_timeout_s, log.info)
            while server.version != self.version:  # newer weights may come while these are sent
                version = self.version
                if server.running or self._trainer_is_changing_weights():  # some requests may still get their answers
                    return False
                await push(self._link, [server.receiver], self._weights, version)
                if self._trainer_is_changing_weights():
                    return False
                server.version = version
        except Unreachable:
            return False
        return True

    def _trainer_is_changing_weights(self) -> bool:
        """Those of the current version are gone then; those of the next one will be there at a later try."""
        return _stamp(self._weights) != self._stamp

    async def _generates(self, server: Server) -> bool:
        try:
            await call(self._client, server.url, "/health_generate", None, HEALTH_S)
        except Unreachable:
            return False
        return True


def _stamp(weights: Weights) -> int:
    """Changes whenever one of the tensors is changed in place."""
    return sum(tensor._version for _, tensor in weights)
