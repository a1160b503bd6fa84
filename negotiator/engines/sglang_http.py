"""Calls to an SGLang server, and which servers stand behind the URLs of a configuration.

Each call has a time limit, and two ways to fail: it may go better elsewhere, or it may not.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from typing import Any

import httpx

LOOK_S = 30.0  # for whatever stands at a URL to say what it is

log = logging.getLogger("negotiator")


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


def find_servers(urls: Sequence[str]) -> list[str]:
    """The SGLang servers at `urls`, each once; a router there stands for the workers that it calls healthy.

    Raises ValueError unless each of them answers from here and can be trained with.
    """
    servers: dict[str, str] = {}
    with httpx.Client(timeout=LOOK_S, trust_env=False) as client:
        for url in urls:
            for server, name in _standing_at(client, url.rstrip("/")):
                servers.setdefault(_identity(client, server, name), server)
    return [*servers.values()]


def _standing_at(client: httpx.Client, url: str) -> list[tuple[str, str]]:
    """The URL itself, or those of a router's healthy workers, each with what messages call it."""
    status, answer = _look(client, url, "/workers", url)
    if status == 404:  # servers know no such path, routers have it since sglang-router 0.2.0
        return [(url, url)]
    try:
        # One that computes data-parallel may be listed as URL@0, URL@1 and so on.
        listed = {re.sub(r"/*(@\d+)?$", "", worker["url"]): worker["is_healthy"] for worker in answer["workers"]}
    except (LookupError, TypeError):
        raise ValueError(f"{url} answers like no SGLang server or router (HTTP {status}); see engine.urls") from None
    healthy = [worker for worker in sorted(listed) if listed[worker]]  # routers list them in any order
    if not healthy:
        raise ValueError(
            f"the router at {url} has no healthy worker among its {len(listed)}: "
            "start servers and add them to it, or name servers in engine.urls"
        )
    for worker in sorted(listed.keys() - healthy):
        log.warning("%s is left out: the router at %s says that it is not healthy", worker, url)
    return [(worker, f"{worker} (a worker of the router at {url})") for worker in healthy]


def _identity(client: httpx.Client, url: str, name: str) -> str:
    """What tells the server at `url` from all others, whatever URLs lead to it. `name`: what messages call it."""
    status, info = _look(client, url, "/server_info", name)
    try:
        mode, copies = info["disaggregation_mode"], info["dp_size"]
    except (LookupError, TypeError):
        raise ValueError(f"{name} answers like no SGLang server (HTTP {status}); see engine.urls") from None
    if mode != "null":
        raise ValueError(f"{name} does only the {mode} part of requests: start it without --disaggregation-mode")
    if copies != 1:
        raise ValueError(
            f"{name} computes with {copies} data-parallel copies, to which SGLang hands no new weights: "
            f"start {copies} servers instead"
        )
    # Seconds that the phases of its start took, with all their digits.
    return json.dumps(info.get("startup_time", url))


def _look(client: httpx.Client, url: str, path: str, name: str) -> tuple[int, Any]:
    """HTTP status of an answer, and what it says if that is JSON."""
    try:
        response = client.get(f"{url}{path}")
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ValueError(f"no SGLang server answers at {name}, see engine.urls: {error}") from None
    try:
        return response.status_code, response.json()
    except ValueError:
        return response.status_code, None


def _said(response: httpx.Response) -> str:
    """An error's message, in one line."""
    try:
        answer = response.json()
    except ValueError:
        answer = response.text
    while isinstance(answer, dict):
        answer = answer.get("error") or answer.get("message") or str(answer)
    return " ".join(str(answer).split())[:500]
