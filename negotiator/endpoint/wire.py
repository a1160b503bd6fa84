"""One HTTP request to an OpenAI-compatible endpoint, and what its answer means."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Set
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from negotiator.endpoint.records import Request, Unanswered

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class Failed(Unanswered):
    """One try, of which the next may go better."""

    def __init__(self, why: str, busy: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.busy = busy  # HTTP 429: the endpoint is well, and this request's turn has not come
        self.wait_s = wait_s  # what the endpoint asked for; 0: nothing


class Refused(Exception):
    """The endpoint understood and said no."""

    def __init__(self, status: int, said: str, named: str | None) -> None:
        super().__init__(f"HTTP {status}: {said}")
        self.status = status
        self.said = said
        self.named = named  # the field it complained about, if it said so as OpenAI does

    def field(self, sent: Set[str]) -> str | None:
        """Which of the fields `sent` the endpoint does not know and can do without; None: it is not about that."""
        if self.status not in (400, 422):
            return None
        if self.named in ("temperature", "top_p", "max_tokens") and self.named in sent:
            return self.named  # newer models of OpenAI's refuse these
        optional = [field for field in ("response_format", "seed") if field in sent]
        if self.named in optional:
            return self.named
        spoken_of = [field for field in optional if field in self.said]
        return next(iter(spoken_of + optional), None)


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    cut_off: bool  # at max_tokens
    prompt_tokens: int
    completion_tokens: int


def new_client(key: str, local: bool) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    # A connection for each request: where a reply comes twice, the second would be taken for that of the next request,
    # and balancers reset idle connections at the moment they are used again.
    headers["connection"] = "close"
    limits = httpx.Limits(max_connections=None)  # the places are counted elsewhere
    # `post` bounds the whole answer instead of each read. This machine is not reached through a proxy.
    return httpx.AsyncClient(headers=headers, timeout=None, limits=limits, trust_env=not local)


def chat_body(request: Request, seed: int, without: Set[str]) -> dict[str, Any]:
    """The request in OpenAI's words, but for the fields that the endpoint does not know."""
    body: dict[str, Any] = {
        "model": request.name,
        "messages": [
            {"role": role, "content": content}
            for role, content in (("system", request.system), ("user", request.user))
            if content
        ],
        "temperature": request.temperature,
        "max_tokens": request.max_tokens,
        "seed": seed,
    }
    if request.top_p < 1:
        body["top_p"] = request.top_p
    if request.schema is not None:
        schema = {"name": "answer", "strict": True, "schema": request.schema}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    for field in without & body.keys():
        value = body.pop(field)
        if field == "max_tokens":
            body["max_completion_tokens"] = value
    return body


async def post(client: httpx.AsyncClient, url: str, body: dict[str, Any], timeout_s: float) -> httpx.Response:
    try:
        async with asyncio.timeout(timeout_s):
            return await client.post(url, json=body)
    except TimeoutError:
        raise Failed(f"no answer within {timeout_s:g} s") from None
    except httpx.RequestError as error:  # connections that fail or break, bodies that cannot be unpacked
        raise Failed(f"{type(error).__name__}: {error}") from None


def failure(response: httpx.Response) -> Failed | Refused:
    """What a status other than 200 means."""
    status = response.status_code
    said, named, code = response.text, None, None
    try:
        error = response.json()["error"]
        said, named, code = error["message"], error.get("param"), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # not all endpoints speak of errors like OpenAI
    said = " ".join(str(said).split())
    passes = status in (408, 409, 429) or status >= 500
    if passes and code != "insufficient_quota":  # OpenAI's 429 for an account without money
        wait_s = retry_after_s(response.headers.get("retry-after", ""))
        return Failed(f"HTTP {status}", busy=status == 429, wait_s=wait_s)
    return Refused(status, said, named if isinstance(named, str) else None)


def read(response: httpx.Response, request: Request) -> Reply:
    """Raises Failed unless it is a chat completion."""
    try:
        answer = response.json()
        (choice, *_) = answer["choices"]
        text = choice["message"]["content"]
        usage = answer.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        cut_off = choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise Failed(f"not a chat completion: {response.text[:80]!r}")
    guesses = (request.prompt_tokens(), len(text.encode()) // 4 + 1)
    prompt_tokens, completion_tokens = (
        count if isinstance(count, int) and count >= 0 else guess for count, guess in zip(counts, guesses, strict=True)
    )
    return Reply(text, cut_off, prompt_tokens, completion_tokens)


def retry_after_s(header: str) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 if it holds neither."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
