"""When a request may be sent, and when one that was sent takes suspiciously long."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Hashable

BURST = 0.1  # of a minute's allowance may be used at once, so that no minute sees more than 110 %
HEDGE_FLOOR_S = 1.0  # faster than this nothing is a straggler
HEDGE_QUANTILE = 0.95  # of the last answers' times; a straggler takes twice as long
HEDGE_NEEDS = 20  # answers that tell what is usual


class Bucket:
    """Fills with `per_minute` a minute, up to `BURST` of that. None: there is always enough."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_s = per_minute / 60 if per_minute else math.inf
        self._capacity = max(1.0, BURST * per_minute) if per_minute else math.inf
        self._level = self._capacity
        self._at = time.monotonic()

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` may be taken. More than the bucket holds may be taken when it is full."""
        self._fill()
        missing = min(amount, self._capacity) - self._level
        return missing / self._per_s if missing > 0 else 0.0

    def take(self, amount: float) -> None:
        """May leave less than nothing, which has to fill up first; a negative amount gives back."""
        self._fill()
        self._level = min(self._capacity, self._level - amount)

    def _fill(self) -> None:
        if self._per_s < math.inf:
            now = time.monotonic()
            self._level = min(self._capacity, self._level + (now - self._at) * self._per_s)
            self._at = now


class Limits:
    """Lets requests through in the order they came: a free place, no pause, requests and tokens left in the minute."""

    def __init__(self, places: int, requests_per_minute: int | None, tokens_per_minute: int | None) -> None:
        self._turn = asyncio.Lock()
        self._places = asyncio.Semaphore(places)
        self._requests = Bucket(requests_per_minute)
        self._tokens = Bucket(tokens_per_minute)
        self._settled = asyncio.Event()
        self._paused_until = 0.0

    @contextlib.asynccontextmanager
    async def place(self, tokens: int) -> AsyncIterator[None]:
        """A place for one request that is expected to take so many tokens; `settle` corrects that."""
        async with contextlib.AsyncExitStack() as held:
            # Only the first in line waits with a place in its hand, and nobody else could use it.
            async with self._turn:
                await held.enter_async_context(self._places)
                while (wait_s := self._wait_s(tokens)) > 0:
                    self._settled.clear()  # what others give back may end the wait
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._settled.wait(), wait_s)
                self._requests.take(1)
                self._tokens.take(tokens)
            yield

    def settle(self, tokens: int) -> None:
        """So many more tokens were taken than expected; a negative number gives back."""
        self._tokens.take(tokens)
        self._settled.set()

    def pause(self, seconds: float) -> bool:
        """Lets nothing through for so long. Whether that is a pause that begins now, not one that is prolonged."""
        now = time.monotonic()
        begins = self._paused_until <= now
        self._paused_until = max(self._paused_until, now + seconds)
        return begins

    def _wait_s(self, tokens: int) -> float:
        return max(self._paused_until - time.monotonic(), self._requests.wait_s(1), self._tokens.wait_s(tokens))


class UsualTimes:
    """How long answers of each kind took lately."""

    def __init__(self) -> None:
        self._seconds: defaultdict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=200))

    def add(self, kind: Hashable, seconds: float) -> None:
        self._seconds[kind].append(seconds)

    def straggles_after_s(self, kind: Hashable) -> float | None:
        """None as long as nobody knows."""
        seconds = sorted(self._seconds[kind])
        if len(seconds) < HEDGE_NEEDS:
            return None
        return max(HEDGE_FLOOR_S, 2 * seconds[int(HEDGE_QUANTILE * len(seconds))])
