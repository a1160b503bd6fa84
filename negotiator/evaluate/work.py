"""Many things done at once, with progress in lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

TELL_EVERY_S = 5.0

T = TypeVar("T")


async def for_each(phase: str, items: Sequence[T], do: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """In order, so many at once. An exception in one of them cancels all and is raised."""
    left: Iterator[T] = iter(items)
    started, done = time.monotonic(), 0

    async def worker() -> None:
        nonlocal done
        for item in left:
            await do(item)
            done += 1

    async def tell() -> None:
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            print(f"{phase}: {done}/{len(items)} done ({time.monotonic() - started:.0f} s)", flush=True)

    print(f"{phase}: {len(items)} to do", flush=True)
    teller = asyncio.create_task(tell())
    workers = [asyncio.create_task(worker()) for _ in range(min(at_once, len(items)))]
    try:
        await asyncio.gather(*workers)
    finally:
        for task in (teller, *workers):
            task.cancel()
    print(f"{phase}: all {len(items)} done ({time.monotonic() - started:.1f} s)", flush=True)
