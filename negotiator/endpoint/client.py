"""The client that everything asks which talks to a model behind an endpoint: judges, data generation, evaluation.

What may pass (time-out, broken connection, 408, 409, 429, 5xx, an answer that cannot be read) is tried again, and in
the end raises Unanswered. What cannot pass (a wrong key, an unknown model) raises RuntimeError.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Set
from pathlib import Path
from typing import TypeVar

import httpx

from negotiator.config import EndpointConfig
from negotiator.endpoint import wire
from negotiator.endpoint.limits import Limits, UsualTimes
from negotiator.endpoint.records import BudgetSpent, EndpointStats, Request, Unanswered
from negotiator.endpoint.store import Budget, Store, Usage
from negotiator.seeds import derive_seed

FIRST_WAIT_S = 0.5  # before the first further try; doubled before each one after it
LONGEST_WAIT_S = 60.0
HEDGED_SHARE = 0.05  # of all calls, at most

T = TypeVar("T")
Kind = tuple[str, str]  # model and version of the wording: requests that are alike but for their contents
log = logging.getLogger("negotiator")


class Endpoint:
    """For use within one event loop.

    Answers are kept in `config.cache` or else in `store`; what was spent in `store`, which is the run's own, or else in
    `config.cache`. Without either both are forgotten.

    Raises ValueError if the URL is none, if the key's environment variable is unset and the endpoint is not on this
    machine, or if a file cannot be used.
    """

    def __init__(self, config: EndpointConfig, store: Path | None) -> None:
        self._config = config
        self._budget = Budget(config.max_calls, config.max_tokens, config.max_cost)
        self._limits = Limits(config.concurrency, config.requests_per_minute, config.tokens_per_minute)
        self._usual = UsualTimes()
        self._without: defaultdict[Kind, set[str]] = defaultdict(set)  # fields that were refused
        self._known: defaultdict[Kind, set[str]] = defaultdict(set)  # fields of requests that were answered
        self._answered: defaultdict[str, int] = defaultdict(int)  # by model
        self._under_way: dict[str, _Shared] = {}
        self._stats = EndpointStats()
        self._key = ""
        if not config.replay:
            self._url, self._key, local = _address(config)
            self._client = wire.new_client(self._key, local)
        kept = config.cache or store
        self._answers = Store(kept, read_only=config.replay) if kept else None
        spent = store or config.cache
        self._usage = self._answers if self._answers and (spent == kept or config.replay) else Store(spent)

    async def ask(self, request: Request, parse: Callable[[str], T]) -> T:
        """What `parse` makes of the answer; it raises Unanswered if it cannot read one, which is then asked for again.

        Raises Unanswered after the last try, BudgetSpent, or RuntimeError where no further try can help. Equal requests
        that are under way share an answer.
        """
        key = request.key()
        unreadable = None
        if self._answers and (text := await self._answers.find(key)) is not None:
            try:
                value = parse(text)
            except Unanswered:
                unreadable = text
            else:
                self._stats.cached += 1
                return value
        if self._config.replay:
            raise RuntimeError(await self._missing(request, unreadable))
        shared = self._under_way.get(key)
        if shared is None:
            shared = _Shared(asyncio.create_task(self._answer(request, key, parse, unreadable)))
            self._under_way[key] = shared
        else:
            self._stats.cached += 1
        shared.waiting += 1
        try:
            return parse(await asyncio.shield(shared.task))
        finally:
            shared.waiting -= 1
            if not shared.waiting:
                del self._under_way[key]
                shared.task.cancel()
                await asyncio.gather(shared.task, return_exceptions=True)

    def stats(self) -> EndpointStats:
        """A snapshot of this process's totals."""
        return dataclasses.replace(self._stats)

    async def close(self) -> None:
        """Ends what is under way."""
        tasks = [shared.task for shared in self._under_way.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not self._config.replay:
            await self._client.aclose()
        for store in {store for store in (self._answers, self._usage) if store}:
            await store.close()

    async def _answer(self, request: Request, key: str, parse: Callable[[str], T], unreadable: str | None) -> str:
        """An answer that `parse` can read, kept."""
        kind = (request.name, request.version)
        without: Set[str] = frozenset()
        seed, failures = request.seed, 0
        while True:
            answered = self._answered[request.name]
            try:
                text = await self._race(request, seed, without, parse)
                break
            except wire.Refused as refused:
                sent = wire.chat_body(request, seed, without | self._without[kind]).keys()
                if field := refused.field(sent - self._known[kind]):
                    without |= {field}
                    continue
                raise self._refusal(refused, kind) from None
            except Unanswered as failed:
                busy, wait_s = isinstance(failed, wire.Failed) and failed.busy, 0.0
                if isinstance(failed, wire.Failed):
                    wait_s = failed.wait_s
                else:  # read and not understood: the same seed would give the same answer
                    seed = derive_seed(request.seed, "try", failures + 1) >> 32
                # As long as others get answers, an endpoint that is busy only says that this one's turn has not come.
                failures += not (busy and self._answered[request.name] > answered)
                if failures > self._config.retries:
                    raise Unanswered(self._masked(f"{failed} ({failures} tries)")) from None
            # Jitter keeps requests that failed together from coming back together.
            backoff_s = FIRST_WAIT_S * 2.0 ** max(0, failures - 1) * random.uniform(0.5, 1)
            await asyncio.sleep(min(max(wait_s, backoff_s), LONGEST_WAIT_S))
            self._stats.retried += 1
        if self._answers is None:
            return text
        return await self._answers.keep(key, request.name, request.version, text, unreadable)

    async def _race(self, request: Request, seed: int, without: Set[str], parse: Callable[[str], T]) -> str:
        """One try, with a second request beside it if the first takes far longer than is usual."""
        loop = asyncio.get_running_loop()
        first_sent, second_sent = loop.create_future(), loop.create_future()
        first = asyncio.create_task(self._once(request, seed, without, parse, first_sent))
        running = {first}
        hedged = False
        try:
            await asyncio.wait([first, first_sent], return_when=asyncio.FIRST_COMPLETED)
            patience_s = self._usual.straggles_after_s((request.name, request.version))
            if self._config.hedge and patience_s is not None:
                await asyncio.wait([first], timeout=patience_s)
                hedged = not first.done() and self._stats.hedged + 1 <= HEDGED_SHARE * self._stats.calls
            if hedged:
                self._stats.hedged += 1
                running.add(asyncio.create_task(self._once(request, seed, without, parse, second_sent)))
            while running:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is None:
                        return task.result()
            return first.result()  # raises what the first one failed with
        finally:
            if hedged and not second_sent.done():
                self._stats.hedged -= 1
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _once(
        self, request: Request, seed: int, without: Set[str], parse: Callable[[str], T], sent: asyncio.Future[None]
    ) -> str:
        """One request, from its turn to an answer that `parse` can read."""
        kind = (request.name, request.version)
        guess = request.prompt_tokens()
        body = wire.chat_body(request, seed, without | self._without[kind])
        async with self._limits.place(guess + request.max_tokens):
            await self._charge(guess)
            sent.set_result(None)
            start = time.monotonic()
            response = await wire.post(self._client, self._url, body, self._config.timeout_s)
            seconds = time.monotonic() - start
        if response.status_code != 200:
            self._settle(request, -guess, 0)
            failure = wire.failure(response)
            if isinstance(failure, wire.Failed) and failure.wait_s:
                self._pause(failure)
            raise failure
        reply = wire.read(response, request)
        self._settle(request, reply.prompt_tokens - guess, reply.completion_tokens)
        self._usual.add(kind, seconds)
        self._answered[request.name] += 1
        self._known[kind] |= body.keys()
        for field in sorted(without - self._without[kind]):
            self._without[kind].add(field)
            log.info("%s refuses %s for %s: it is asked without from now on", self._url, field, request.name)
        try:
            parse(reply.text)
        except Unanswered as why:
            raise Unanswered(f"cut off at {request.max_tokens} tokens: {why}" if reply.cut_off else str(why)) from None
        return reply.text

    async def _charge(self, prompt_tokens: int) -> None:
        """Counts a request that is about to be sent; BudgetSpent if it must not be."""
        price = self._config.prompt_price / 1e6
        charged = self._usage.charge(self._budget, Usage(1, prompt_tokens, 0, price * prompt_tokens))
        # Without a budget nothing waits for the disk here.
        if self._budget.limited and (spent := await charged):
            raise BudgetSpent(f"the budget is spent, {spent}: nothing more is asked of {self._url}")
        self._stats.calls += 1
        self._stats.prompt_tokens += prompt_tokens
        self._stats.cost += price * prompt_tokens

    def _settle(self, request: Request, prompt_tokens: int, completion_tokens: int) -> None:
        """Corrects the guesses of a request: so many more prompt tokens, and all of those written."""
        cost = (self._config.prompt_price * prompt_tokens + self._config.completion_price * completion_tokens) / 1e6
        self._usage.add(Usage(0, prompt_tokens, completion_tokens, cost))
        self._limits.settle(prompt_tokens + completion_tokens - request.max_tokens)
        self._stats.prompt_tokens += prompt_tokens
        self._stats.completion_tokens += completion_tokens
        self._stats.cost += cost

    def _pause(self, failed: wire.Failed) -> None:
        wait_s = min(failed.wait_s, LONGEST_WAIT_S)
        if self._limits.pause(wait_s):
            log.info(
                "%s asks for a pause (%s): nothing is sent for %.1f s; requests_per_minute and tokens_per_minute keep "
                "below its limits",
                self._url,
                failed,
                wait_s,
            )

    def _refusal(self, refused: wire.Refused, kind: Kind) -> Exception:
        said = self._masked(refused.said)[:300]
        if self._known[kind] and refused.status in (
            400,
            413,
            422,
        ):  # others were answered: this one is too long, or odd
            return Unanswered(f"refused with HTTP {refused.status}: {said}")
        return RuntimeError(
            f"{self._url} refused with HTTP {refused.status}; check the url, the model's name and the key in "
            f"{self._config.api_key_env}. It said: {said}"
        )

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    async def _missing(self, request: Request, unreadable: str | None) -> str:
        assert self._answers is not None, "EndpointConfig asks for the cache"
        if unreadable is not None:
            return f"{self._config.cache} holds an answer that cannot be read: {unreadable[:80]!r}"
        count = await self._answers.count(request.name, request.version)
        return (
            f"{self._config.cache} holds no answer to a request to replay ({count} others of {request.name} to this "
            f"wording), which begins with {request.user[:80]!r}; run without replay to record it"
        )


@dataclasses.dataclass(slots=True, eq=False)
class _Shared:
    """A request under way, and how many wait for it."""

    task: asyncio.Task[str]
    waiting: int = 0


def _address(config: EndpointConfig) -> tuple[str, str, bool]:
    """(where to post, key, whether it is on this machine); ValueError if anything of that is missing."""
    url = httpx.URL(config.url or "")
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"the url of an endpoint must look like https://host/v1, not {config.url!r}")
    local = url.host in wire.LOCAL_HOSTS
    key = os.environ.get(config.api_key_env, "").strip()
    if not key and not local:
        raise ValueError(f"set the environment variable {config.api_key_env} to the key of {config.url}")
    if not (key.isascii() and key.isprintable()):  # checked here: the HTTP client would quote it in its error
        raise ValueError(f"the key in {config.api_key_env} holds characters that no key has")
    return f"{str(config.url).rstrip('/')}/chat/completions", key, local
