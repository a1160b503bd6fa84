"""Calls to an SGLang server. Each has a time limit, and two ways to fail: it may go better elsewhere, or it may not."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx


class Unreachable(RuntimeError):
    """The server at `url` did not answer, or not sensibly: another server, or the same one restarted, may do better."""

    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"{url}: {why}")
        self.url = url


class Refused(ValueError):
    """The server understood and said no: asking again would not help."""


def new_client() -> httpx.AsyncClient:
    """No limits of its own: `call` bounds each answer as a whole, and servers queue what they cannot run yet."""
    # Servers close idle connections after 5 s. One that is reused at that moment would look like a server that died.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
    return httpx.AsyncClient(timeout=None, limits=limits, trust_env=False)  # never through a proxy


async def call(client: httpx.AsyncClient, url: str, path: str, body: object, timeout_s: float) -> Any:
    """The server's answer, parsed if it is JSON. `body`: to be sent as JSON, or JSON already; None asks with GET."""
    try:
        async with asyncio.timeout(timeout_s):
            if body is None:
                response = await client.get(f"{url}{path}")
            else:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                headers = {"content-type": "application/json"}
                response = await client.post(f"{url}{path}", content=content, headers=headers)
    except TimeoutError:
        raise Unreachable(url, f"no answer to {path} within {timeout_s:g} s") from None
    except httpx.TransportError as error:
        raise Unreachable(url, f"{path} failed with {type(error).__name__} {error}".rstrip()) from None
    status = response.status_code
    if status >= 500 or status in (408, 429):
        raise Unreachable(url, f"{path} failed with HTTP {status}: {_said(response)}")
    if status != 200:
        raise Refused(f"{url} refused {path} with HTTP {status}: {_said(response)}")
    if not response.headers.get("content-type", "").startswith("application/json"):
        return response.text
    try:
        return response.json()
    except ValueError:
        raise Unreachable(url, f"{path} answered with broken JSON: {response.text[:80]!r}") from None


def require_server(url: str) -> None:
    """Raises ValueError unless an SGLang server answers at `url`."""
    try:
        response = httpx.get(f"{url.rstrip('/')}/model_info", timeout=10.0, trust_env=False)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ValueError(f"no SGLang server answers at {url}, see engine.urls: {error}") from None
    if response.status_code != 200:
        raise ValueError(f"{url} answers like no SGLang server (HTTP {response.status_code}); see engine.urls")


def _said(response: httpx.Response) -> str:
    """An error's message, in one line."""
    try:
        answer = response.json()
    except ValueError:
        answer = response.text
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or str(answer)
    return " ".join(str(answer).split())[:500]
