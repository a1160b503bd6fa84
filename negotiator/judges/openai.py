"""Any OpenAI-compatible endpoint as judge, asked for JSON at temperature 0.

What may pass (time-out, broken connection, 408, 429, 5xx, an answer that cannot be read) is tried again, and in the end
becomes a failed verdict, never a made-up score. What cannot pass (a wrong key or model) raises RuntimeError.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx

from negotiator.config import JudgeConfig
from negotiator.prompts.wording import fill, spoken
from negotiator.types import AgreementVerdict, Dialogue, Scenario, ScoreVerdict

FIRST_WAIT_S = 0.5  # before the first further try; doubled before each one after it
LONGEST_WAIT_S = 60.0
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")

T = TypeVar("T")


class Unanswered(Exception):
    """A try that may go better next time. `wait_s` is what the server asked for, 0 if it asked for nothing."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class OpenAIJudge:
    """Both judges over one endpoint and one pool of connections, for use within one event loop.

    Raises ValueError if the URL is none, or if the key's environment variable is unset and the endpoint is not local.
    """

    def __init__(self, config: JudgeConfig) -> None:
        assert config.url and config.name, "JudgeConfig asks for both"
        url = httpx.URL(config.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"judge.url must look like https://host/v1, not {config.url!r}")
        key = os.environ.get(config.api_key_env, "").strip()
        if not key and url.host not in LOCAL_HOSTS:
            raise ValueError(f"set the environment variable {config.api_key_env} to the key of {config.url}")
        if not (key.isascii() and key.isprintable()):  # checked here: the HTTP client would quote it in its error
            raise ValueError(f"the key in {config.api_key_env} holds characters that no key has")
        self._config = config
        self._key = key
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._places = asyncio.Semaphore(config.concurrency)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # `timeout_s` bounds the whole answer instead, however slowly it trickles in
            limits=httpx.Limits(max_connections=config.concurrency),
        )

    async def agreement(self, scenario: Scenario, dialogue: Dialogue) -> AgreementVerdict:
        quoted = spoken(scenario, [utterance.text for utterance in dialogue.utterances])
        user = fill("judge_agreement_openai_user", dilemma=scenario.dilemma.text, dialogue=quoted)
        try:
            agree = await self._ask(fill("judge_agreement_openai_system"), user, parse_agreement)
        except Unanswered as why:
            return AgreementVerdict(False, 0.0, failure=str(why))
        return AgreementVerdict(agree, float(agree))

    async def score(self, scenario: Scenario, dialogue: Dialogue) -> ScoreVerdict:
        assert dialogue.completion is not None, "scored before it was completed"
        user = fill("judge_score_openai_user", dilemma=scenario.dilemma.text, completion=dialogue.completion)
        try:
            return ScoreVerdict(await self._ask(fill("judge_score_openai_system"), user, parse_score))
        except Unanswered as why:
            return ScoreVerdict(float("nan"), failure=str(why))

    async def close(self) -> None:
        await self._client.aclose()

    async def _ask(self, system: str, user: str, parse: Callable[[str], T]) -> T:
        """Raises Unanswered after the last try."""
        body = {
            "model": self._config.name,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
            "temperature": 0,
        }
        for attempt in range(self._config.retries + 1):
            try:
                async with self._places:
                    return parse(await self._post(body))
            except Unanswered as failed:
                if attempt == self._config.retries:
                    raise Unanswered(f"{failed} ({attempt + 1} tries)") from None
                # Jitter keeps requests that failed together from coming back together.
                backoff = FIRST_WAIT_S * 2**attempt * random.uniform(0.5, 1)
                wait_s = min(max(failed.wait_s, backoff), LONGEST_WAIT_S)
            await asyncio.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    async def _post(self, body: Mapping[str, object]) -> str:
        """The answer's text. Raises Unanswered, or RuntimeError where another try cannot help."""
        try:
            async with asyncio.timeout(self._config.timeout_s):
                response = await self._client.post(self._url, json=body)
        except TimeoutError:
            raise Unanswered(f"no answer within {self._config.timeout_s:g} s") from None
        except httpx.TransportError as error:
            raise Unanswered(f"{type(error).__name__}: {error}") from None
        status = response.status_code
        if status in (408, 429) or status >= 500:
            raise Unanswered(f"HTTP {status}", _retry_after(response.headers.get("retry-after", "")))
        if status != 200:
            said = response.text[:300].replace(self._key, "***") if self._key else response.text[:300]
            raise RuntimeError(
                f"the judge at {self._url} refused with HTTP {status}; check judge.url, judge.name and the key in "
                f"{self._config.api_key_env}. It said: {said}"
            )
        try:
            content = response.json()["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            content = None
        if not isinstance(content, str):
            raise Unanswered(f"not a chat completion: {response.text[:80]!r}")
        return content


def parse_agreement(answer: str) -> bool:
    """{"agree": true}, or a bare true, yes, false or no; Unanswered for anything else."""
    value = _value(answer, "agree")
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip(" .!").lower() in ("yes", "no"):
        return value.strip(" .!").lower() == "yes"
    raise Unanswered(f"the answer is neither yes nor no: {answer[:80]!r}")


def parse_score(answer: str) -> float:
    """{"score": 3}, or a bare number, from 0 to 5; Unanswered for anything else."""
    value = _value(answer, "score")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 5:
        return float(value)
    raise Unanswered(f"the answer is no score from 0 to 5: {answer[:80]!r}")


def _value(answer: str, name: str) -> object:
    """The field `name` of a JSON object, a bare JSON value, or else the text itself; code fences and thoughts aside."""
    text = answer.rpartition("</think>")[2].strip()
    fenced = re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL)
    text = fenced[1] if fenced else text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return text
    return value.get(name) if isinstance(value, dict) else value


def _retry_after(header: str) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date; 0 if it holds neither."""
    if re.fullmatch(r"\d+(\.\d+)?", header):
        return float(header)
    try:
        return max(0.0, (parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
