"""An OpenAI-compatible endpoint as judge, against a real server on this machine that misbehaves in every usual way."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest

from negotiator.config import JudgeConfig
from negotiator.judges import make_judges
from negotiator.judges import openai as openai_module
from negotiator.judges.openai import OpenAIJudge, Unanswered, parse_agreement, parse_score
from negotiator.types import Agent, Dialogue, Dilemma, Generation, Persona, Scenario, Utterance

T = TypeVar("T")
SCENARIO = Scenario(
    0,
    Dilemma("d", "", "", "Who gets the well?"),
    Persona("The Giver", "You give."),
    Persona("The Taker", "You take."),
    "p",
)


def said(agent: Agent, text: str) -> Utterance:
    return Utterance(agent, text, (), 0, Generation((), (), "stop", 0, 0))


DONE = Dialogue(
    SCENARIO, 0, [said("agent1", "I offer half."), said("agent2", "I take half.")], completion="Each takes half."
)


Answer = tuple[int, dict[str, str], str]


class Endpoint:
    """A real HTTP server; `answer(n)` makes its n-th answer: status, headers, body."""

    def __init__(self, answer: Callable[[int], Answer]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = 0
        endpoint, lock, at_once = self, threading.Lock(), [0]

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append({"path": self.path, "headers": dict(self.headers), "body": body})
                    at_once[0] += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, at_once[0])
                status, headers, text = answer(number)
                with lock:
                    at_once[0] -= 1
                if status == 0:  # hang up without a word
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[int], Answer]], Endpoint]]:
    monkeypatch.setattr(openai_module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("TEST_KEY", "sk-secret")
    endpoints: list[Endpoint] = []

    def start(answer: Callable[[int], Answer]) -> Endpoint:
        endpoints.append(Endpoint(answer))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def says(content: str) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]})


def config_for(url: str, **fields: Any) -> JudgeConfig:
    return JudgeConfig(agreement="openai", reward="openai", url=url, name="m", api_key_env="TEST_KEY", **fields)


def ask(endpoint: Endpoint, call: Callable[[OpenAIJudge], Awaitable[T]], **fields: Any) -> T:
    async def main() -> T:
        judge = OpenAIJudge(config_for(endpoint.url, **fields))
        try:
            return await call(judge)
        finally:
            await judge.close()

    return asyncio.run(main())


def score(judge: OpenAIJudge) -> Awaitable[Any]:
    return judge.score(SCENARIO, DONE)


def agreement(judge: OpenAIJudge) -> Awaitable[Any]:
    return judge.agreement(SCENARIO, DONE)


Serve = Callable[[Callable[[int], Answer]], Endpoint]


def test_endpoint_is_asked_once_for_json_at_temperature_0(serve: Serve) -> None:
    endpoint = serve(lambda n: says(['{"agree": true}', '{"score": 4}'][n]))

    async def both(judge: OpenAIJudge) -> tuple[Any, Any]:
        return await agreement(judge), await score(judge)

    agreed, scored = ask(endpoint, both)
    assert (agreed.agree, agreed.probability, agreed.failure) == (True, 1.0, None)
    assert (scored.score, scored.failure) == (4.0, None)
    first, second = endpoint.requests
    assert first["path"] == "/v1/chat/completions" and first["headers"]["Authorization"] == "Bearer sk-secret"
    assert first["body"]["model"] == "m" and first["body"]["temperature"] == 0
    assert [m["role"] for m in first["body"]["messages"]] == ["system", "user"]
    user = first["body"]["messages"][1]["content"]
    assert SCENARIO.dilemma.text in user and "The Giver: I offer half.\nThe Taker: I take half." in user
    assert "Each takes half." in second["body"]["messages"][1]["content"]


@pytest.mark.parametrize(
    "trouble",
    [
        (429, {}, ""),
        (500, {}, "oops"),
        (503, {}, ""),
        (408, {}, ""),
        (0, {}, ""),
        says("well, hm"),
        says('{"score": 9}'),
        (200, {}, "<html>"),
        (200, {}, "[]"),
        (200, {}, '{"choices": []}'),
    ],
    ids=lambda trouble: f"{trouble[0]}-{trouble[2][-12:]}",
)
def test_passing_trouble_is_tried_again_and_then_a_failed_verdict(serve: Serve, trouble: Answer) -> None:
    recovering = serve(lambda n: trouble if n < 2 else says('{"score": 2}'))
    assert ask(recovering, score, retries=2).score == 2.0
    assert len(recovering.requests) == 3
    lasting = serve(lambda n: trouble)
    verdict = ask(lasting, score, retries=2)
    assert "(3 tries)" in verdict.failure and math.isnan(verdict.score)
    assert len(lasting.requests) == 3
    agreed = ask(lasting, agreement, retries=0)
    assert agreed.failure is not None and not agreed.agree


def test_a_slow_answer_is_a_time_out(serve: Serve) -> None:
    def answer(n: int) -> Answer:
        time.sleep(1.0 if n == 0 else 0)
        return says('{"agree": false}')

    endpoint = serve(answer)
    verdict = ask(endpoint, agreement, retries=1, timeout_s=0.3)
    assert verdict.failure is None and not verdict.agree and len(endpoint.requests) == 2
    assert (
        ask(serve(lambda n: answer(0)), agreement, retries=0, timeout_s=0.2).failure
        == "no answer within 0.2 s (1 tries)"
    )


def test_no_server_is_a_failed_verdict(serve: Serve) -> None:
    endpoint = serve(lambda n: says("yes"))
    endpoint.server.shutdown()
    endpoint.server.server_close()
    assert "ConnectError" in ask(endpoint, agreement, retries=1).failure


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(serve: Serve, as_date: bool) -> None:
    def answer(n: int) -> Answer:
        wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "0.6"
        return (429, {"retry-after": wait}, "") if n == 0 else says('{"score": 1}')

    endpoint = serve(answer)
    start = time.monotonic()
    assert ask(endpoint, score).score == 1.0
    assert time.monotonic() - start > (0.9 if as_date else 0.6)  # a date has whole seconds


@pytest.mark.parametrize("status", [400, 401, 403, 404, 301])
def test_what_cannot_pass_ends_the_run_without_showing_the_key(serve: Serve, status: int) -> None:
    endpoint = serve(lambda n: (status, {}, "Incorrect key sk-secret"))
    with pytest.raises(RuntimeError, match=rf"refused with HTTP {status}; check judge\.url, judge\.name") as error:
        ask(endpoint, score)
    assert "TEST_KEY" in str(error.value) and "sk-secret" not in str(error.value)
    assert len(endpoint.requests) == 1


def test_requests_are_bounded_and_the_wait_for_a_place_is_no_time_out(serve: Serve) -> None:
    def answer(n: int) -> Answer:
        time.sleep(0.2)
        return says('{"score": 3}')

    endpoint = serve(answer)
    fields = {"concurrency": 2, "retries": 0, "timeout_s": 1.0}
    verdicts = ask(endpoint, lambda judge: asyncio.gather(*(score(judge) for _ in range(14))), **fields)
    assert [v.score for v in verdicts] == [3.0] * 14 and endpoint.most_at_once == 2


def test_the_key_is_needed_except_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    OpenAIJudge(config_for("http://localhost:8000/v1"))
    with pytest.raises(
        ValueError, match=r"set the environment variable TEST_KEY to the key of https://api\.example/v1"
    ):
        OpenAIJudge(config_for("https://api.example/v1"))
    monkeypatch.setenv("TEST_KEY", "sk-sec\nret")
    with pytest.raises(ValueError, match="characters that no key has") as error:
        OpenAIJudge(config_for("https://api.example/v1"))
    assert "sec" not in str(error.value).replace("characters", "")


def test_a_url_must_be_one() -> None:
    with pytest.raises(ValueError, match=r"judge\.url must look like https://host/v1, not 'api\.example'"):
        OpenAIJudge(config_for("api.example"))


@pytest.mark.parametrize(
    ("answer", "agree"),
    [
        ('{"agree": true}', True),
        ('```json\n{"agree": false}\n```', False),
        ('<think>Yes or no?</think>\n\n{"agree": false}', False),
        (" Yes.", True),
        ("NO", False),
        ("true", True),
        ('{"agree": "no"}', False),
        ("Yes, but not quite", None),
        ('{"agree": 1}', None),
        ('{"score": 1}', None),
        ("", None),
    ],
)
def test_parse_agreement(answer: str, agree: bool | None) -> None:
    if agree is None:
        with pytest.raises(Unanswered):
            parse_agreement(answer)
    else:
        assert parse_agreement(answer) is agree


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": 3}', 3),
        ('{"score": 0}', 0),
        ('```\n{"score": 4.5}\n```', 4.5),
        ("5", 5),
        ('{"score": "3"}', None),
        ('{"score": 6}', None),
        ('{"score": -1}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ("3 of 5", None),
        ("I give it a 3", None),
    ],
)
def test_parse_score(answer: str, score: float | None) -> None:
    if score is None:
        with pytest.raises(Unanswered):
            parse_score(answer)
    else:
        assert parse_score(answer) == score


def test_one_endpoint_serves_both_roles() -> None:
    agreement_judge, reward_judge = make_judges(config_for("http://localhost:1/v1"), None)
    assert agreement_judge is reward_judge  # so that `concurrency` bounds them together
