"""Generation on SGLang servers, the trainer's own or anybody's, over HTTP.

    warm      a prefix is computed once, on the ready server that holds the fewest; prompts that begin with it go there
    generate  explicit seed, log-probs of the output alone (those of the prompt would bypass the cache), cache entries
              keyed by weight version; whatever comes back is checked
    weights   nothing runs while they change (`weight_sync`)

The requests of a server that goes down (`sglang_fleet`) move to another one, which warms their prefix first, or wait.
Every wait has a limit, and its error says what it waited for.

An SGLang router is asked for its workers when a run begins, and never again: weights, caches and checksums are each
server's own, so servers are talked to directly, and prefixes are placed here. A worker that goes down is treated like
any other server; one that joins the router later takes part from the next start on, which may be a resumption.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from negotiator.config import EngineConfig
from negotiator.engines.base import EngineStats
from negotiator.engines.reuse import PerfectCache
from negotiator.engines.sglang_fleet import Fleet, Server
from negotiator.engines.sglang_http import Unreachable, call, new_client
from negotiator.engines.sglang_server import ServerSettings
from negotiator.engines.weight_sync import Weights
from negotiator.types import Generation, SamplingParams

TRIES = 4  # of one request, each after a server went down
ONE_TOKEN = {"max_new_tokens": 1, "temperature": 0}  # greedy, so that log-probs are those of temperature 1

T = TypeVar("T")


class SGLangEngine:
    """An `Engine` (see `engines.base`) over SGLang servers that serve one model, for use within one event loop.

    The first `update_weights` starts the trainer's own servers; nothing can be generated before it.
    """

    def __init__(
        self, servers: Sequence[ServerSettings | str], config: EngineConfig, logs: Path, same_gpu: bool = False
    ) -> None:
        """`servers`, `logs` and `same_gpu`: see `Fleet`."""
        urls = [server for server in servers if isinstance(server, str)]
        self.path = f"SGLang at {', '.join(urls)}" if urls else f"{len(servers)} SGLang server(s)"
        self._client = new_client()
        self._fleet = Fleet(servers, config, logs, self._client, same_gpu)
        self._config = config
        self._started = False
        self._running = 0
        self._idle = asyncio.Event()  # set when the last running request ends
        self._open = asyncio.Event()  # unset while weights change
        self._prefixes: dict[tuple[int, ...], int] = {}  # warmed ones, and the version under which they were used last
        self._perfect = PerfectCache()
        self._stats = EngineStats()

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Samples a continuation of `prompt_ids`. It may also end with the model's own end token.

        Raises ValueError if a server refuses, RuntimeError if none answers.
        """
        if not prompt_ids:
            raise ValueError("the prompt is empty; it needs at least one token")
        if sampling.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1: {sampling}")
        parameters = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop_token_ids": list(sampling.stop_ids),
            "sampling_seed": sampling.seed,
            "ignore_eos": not sampling.stop_ids,  # it would ignore those, too
        }

        async def ask(server: Server) -> Generation:
            generation, _ = await self._ask(server, prompt_ids, parameters)
            self._stats.generated_tokens += len(generation.ids)
            return generation

        return await self._on_a_server(self._prefix_of(prompt_ids), ask)

    async def next_logprobs(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs (temperature 1, whole vocabulary) of each of `token_ids` as the token after `prompt_ids`."""

        async def ask(server: Server) -> list[float]:
            _, meta = await self._ask(server, prompt_ids, ONE_TOKEN, token_ids_logprob=list(token_ids))
            (found,) = meta["output_token_ids_logprobs"]
            logprobs = {token: logprob for logprob, token, _ in found}
            return [logprobs[token] for token in token_ids]

        return await self._on_a_server(self._prefix_of(prompt_ids), ask)

    async def warm(self, prefix_ids: Sequence[int]) -> None:
        """Puts a prefix into the cache of one server, so that requests sent together afterwards all share it."""
        prefix = tuple(prefix_ids)
        self._prefixes[prefix] = self._fleet.version

        async def nothing_more(server: Server) -> None: ...

        await self._on_a_server(prefix, nothing_more)

    async def update_weights(self, named_tensors: Weights, version: int) -> None:
        """Waits until nothing runs, then makes every server serve the new weights and forget the old ones' cache.

        `named_tensors` is kept and iterated again for servers that come back: it must give the same tensors each time.
        """
        assert iter(named_tensors) is not named_tensors, "weights are sent more than once: pass no iterator"
        self._open.clear()
        try:
            if not self._started:
                await self._fleet.start(next(iter(named_tensors))[1].device)
                self._started = True
            while self._running:
                self._idle.clear()
                await self._idle.wait()  # each request has its own limits
            # Dialogues may go on under the new weights: what is in use is warmed anew when it is needed.
            used = self._fleet.version
            self._prefixes = {prefix: version for prefix, version in self._prefixes.items() if version == used}
            self._perfect = PerfectCache()
            await self._fleet.serve(named_tensors, version)
        finally:
            self._open.set()

    async def release(self) -> None:
        """See `engines.base`: the memory of servers that share the trainer's GPU."""
        await self._fleet.release()

    def stats(self) -> EngineStats:
        """A copy of the totals so far. Forward passes and their seconds are the servers' own business."""
        return dataclasses.replace(self._stats)

    async def close(self) -> None:
        """Stops the trainer's own servers. Others go on, with the weights they have."""
        await self._fleet.close()
        await self._client.aclose()

    async def _on_a_server(self, prefix: tuple[int, ...] | None, action: Callable[[Server], Awaitable[T]]) -> T:
        """The result of `action` on the server that has `prefix`; on another one, or again, if that goes down."""
        assert self._started, "no weights yet: call update_weights first"
        failures: list[str] = []
        while len(failures) < TRIES:
            await self._fleet.one_is_ready()  # not in a turn: it may take the next weights to bring one back
            async with self._turn():
                if not self._fleet.ready:
                    continue
                server = self._place(prefix)
                server.running += 1
                try:
                    if prefix is not None:
                        await self._ensure_warm(server, prefix)
                    return await action(server)
                except Unreachable as failure:
                    failures.append(str(failure))
                    self._fleet.goes_down(server, str(failure))
                finally:
                    server.running -= 1
        raise RuntimeError(f"gave up on a request after {TRIES} tries: {'; '.join(failures)}")

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Waits while weights change, and keeps them from changing meanwhile."""
        while not self._open.is_set():
            await self._open.wait()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()

    def _place(self, prefix: tuple[int, ...] | None) -> Server:
        """The ready server that holds `prefix`, or the one that holds the fewest."""
        ready = self._fleet.ready
        if prefix is None:
            return min(ready, key=lambda server: server.running)
        for server in ready:
            if prefix in server.warmed:
                return server
        # Among equals a hash decides: in turns, every server would get one role of all scenarios, and idle in between.
        return min(ready, key=lambda server: (len(server.warmed), _rank(prefix, server.url)))

    def _prefix_of(self, prompt_ids: Sequence[int]) -> tuple[int, ...] | None:
        """The longest warmed prefix of a prompt."""
        prompt = tuple(prompt_ids)
        fitting = [prefix for prefix in self._prefixes if prompt[: len(prefix)] == prefix]
        longest = max(fitting, key=len, default=None)
        if longest is not None:
            self._prefixes[longest] = self._fleet.version
        return longest

    async def _ensure_warm(self, server: Server, prefix: tuple[int, ...]) -> None:
        """Computes the prefix on the server unless somebody has; all who need it wait for the same request."""
        if prefix not in server.warmed:
            server.warmed[prefix] = asyncio.create_task(self._ask(server, prefix, ONE_TOKEN))
        await asyncio.shield(server.warmed[prefix])

    async def _ask(
        self, server: Server, prompt_ids: Sequence[int], parameters: dict[str, Any], **more: Any
    ) -> tuple[Generation, dict[str, Any]]:
        """One request, counted if it succeeds; also returns what else the server says about it."""
        reusable = self._perfect.reusable(prompt_ids)
        version = self._fleet.version
        body = {
            "input_ids": list(prompt_ids),
            "sampling_params": parameters,
            "return_logprob": True,
            "logprob_start_len": -1,  # of the output alone: prompt log-probs would bypass the cache
            "extra_key": str(version),
        }
        answer = await call(self._client, server.url, "/generate", body | more, self._config.request_timeout_s)
        generation = read_generation(server.url, answer, parameters["max_new_tokens"], version)
        self._stats.prompt_tokens += len(prompt_ids)
        self._stats.cached_prompt_tokens += generation.cached_tokens
        # Requests under way share what they have computed so far, so more may be cached than had been finished.
        self._stats.reusable_prompt_tokens += max(reusable, generation.cached_tokens)
        self._perfect.hold([*prompt_ids, *generation.ids[:-1]])
        return generation, answer["meta_info"]


def read_generation(url: str, answer: Any, max_tokens: int, version: int) -> Generation:
    """An answer to `/generate` as a Generation.

    Raises Unreachable if it is not what was asked for, ValueError if the text was cut short.
    """
    try:
        meta = answer["meta_info"]
        reason = meta["finish_reason"]
        ids = tuple(int(token) for token in answer["output_ids"])
        pairs = [(logprob, token) for logprob, token, _ in meta["output_token_logprobs"]]
        served, cached = meta["weight_version"], int(meta["cached_tokens"])
    except (LookupError, TypeError, ValueError):
        raise Unreachable(url, f"not an answer to /generate: {str(answer)[:200]}") from None
    logprobs = tuple(math.nan if logprob is None else float(logprob) for logprob, _ in pairs)
    if served != str(version):
        raise Unreachable(url, f"it serves weights {served!r} instead of {version}")
    if reason["type"] == "abort":
        raise Unreachable(url, f"it aborted a request: {reason.get('message')}")
    if not ids or tuple(token for _, token in pairs) != ids:
        raise Unreachable(url, f"{len(ids)} tokens came with the log-probs of {len(pairs)} others")
    if not all(map(math.isfinite, logprobs)):
        raise Unreachable(url, "a log-prob is not a number, so the weights or the logits are not")
    if reason["type"] == "stop" and reason["matched"] == ids[-1]:
        return Generation(ids, logprobs, "stop", cached, version)
    if reason["type"] == "length" and len(ids) == max_tokens:
        return Generation(ids, logprobs, "length", cached, version)
    raise ValueError(
        f"{url} ended a text of {len(ids)} tokens, not {max_tokens}, for {reason}: if its cache is too small for "
        "prompt and text, raise engine.cache_tokens"
    )


def _rank(prefix: tuple[int, ...], url: str) -> bytes:
    return hashlib.blake2b(f"{prefix} {url}".encode(), digest_size=8).digest()
