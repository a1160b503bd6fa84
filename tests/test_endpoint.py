"""The client for OpenAI-compatible endpoints, against a real server on this machine that misbehaves in every way."""

from __future__ import annotations

import asyncio
import json
import logging
import random
import selectors
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import httpx
import pytest
from misbehaving_endpoint import Answer, MisbehavingEndpoint, Received, says

from negotiator.config import EndpointConfig
from negotiator.endpoint import BudgetSpent, Endpoint, Request, Unanswered, client, limits, wire
from negotiator.endpoint.limits import Bucket
from negotiator.endpoint.store import Store

T = TypeVar("T")
Serve = Callable[[Callable[[int, Received], Answer]], MisbehavingEndpoint]
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("TEST_KEY", "sk-secret")
    endpoints: list[MisbehavingEndpoint] = []

    def start(answer: Callable[[int, Received], Answer]) -> MisbehavingEndpoint:
        endpoints.append(MisbehavingEndpoint(answer))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


def parse(text: str) -> int:
    try:
        score = json.loads(text)["score"]
    except (ValueError, LookupError, TypeError):
        raise Unanswered(f"no score: {text[:40]!r}") from None
    if not isinstance(score, int) or not 0 <= score < 10_000:
        raise Unanswered(f"no score from 0 to 9999: {score}")
    return score


def score(number: int) -> str:
    return json.dumps({"score": number})


def question(number: int, **fields: Any) -> Request:
    return Request("m", "You score.", f"question {number}", "1", **fields)


def number_of(received: Received) -> int:
    return int(received.user.split()[-1])


def echo(n: int, received: Received) -> Answer:
    return says(score(number_of(received)))


def using(url: str | None, call: Callable[[Endpoint], Awaitable[T]], store: Path | None = None, **fields: Any) -> T:
    async def main() -> T:
        endpoint = Endpoint(EndpointConfig(url=url, name="m", api_key_env="TEST_KEY", **fields), store)
        try:
            return await call(endpoint)
        finally:
            await endpoint.close()
            await asyncio.sleep(0.01)  # the HTTP client's generators end a moment later
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task was left behind"

    return asyncio.run(main())


def ask(request: Request) -> Callable[[Endpoint], Awaitable[int]]:
    return lambda endpoint: endpoint.ask(request, parse)


def ask_all(*numbers: int) -> Callable[[Endpoint], Awaitable[list[Any]]]:
    """Asks all at once; an exception is the answer to what raised it."""
    return lambda endpoint: asyncio.gather(
        *(endpoint.ask(question(number), parse) for number in numbers), return_exceptions=True
    )


# What is sent


def test_a_request_is_sent_in_openais_words(serve: Serve) -> None:
    server = serve(echo)
    request = question(3, temperature=0.5, top_p=0.9, max_tokens=9, seed=5, schema=SCHEMA)
    assert using(server.url, ask(request)) == 3
    (received,) = server.received
    assert received.path == "/v1/chat/completions" and received.headers["authorization"] == "Bearer sk-secret"
    assert received.body == {
        "model": "m",
        "messages": [{"role": "system", "content": "You score."}, {"role": "user", "content": "question 3"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 9,
        "seed": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
        },
    }


@pytest.mark.parametrize("names_it", [True, False])
def test_fields_that_an_endpoint_refuses_are_left_out_from_then_on(
    serve: Serve, caplog: pytest.LogCaptureFixture, names_it: bool
) -> None:
    def answer(n: int, received: Received) -> Answer:
        for field in ("response_format", "seed", "max_tokens"):
            if field in received.body and (names_it or field != "max_tokens"):
                error = {"message": "no", "param": field} if names_it else {"message": "no"}
                return Answer(json.dumps({"error": error}), 400)
        return says(score(1))

    server = serve(answer)
    caplog.set_level(logging.INFO, "negotiator")

    async def several(endpoint: Endpoint) -> None:
        await endpoint.ask(question(0, schema=SCHEMA), parse)
        first = len(server.received)
        await asyncio.gather(*(endpoint.ask(question(n, schema=SCHEMA), parse) for n in (1, 2)))
        assert len(server.received) == first + 2
        assert endpoint.stats().calls == len(server.received)

    using(server.url, several)
    assert "max_completion_tokens" in server.received[-1].body or not names_it
    refused = [record.getMessage().split()[2] for record in caplog.records]
    assert refused == (["max_tokens", "response_format", "seed"] if names_it else ["response_format", "seed"])


# What goes wrong


TROUBLES = {
    "429": Answer("", 429),
    "409": Answer("", 409),
    "408": Answer("", 408),
    "500": Answer("oops", 500),
    "503": Answer("", 503),
    "reset": Answer("", trouble="reset"),
    "cut": says(score(2), trouble="cut"),
    "malformed": Answer(says(score(2)).body[:-9]),
    "html": Answer("<html>"),
    "list": Answer("[]"),
    "no choice": Answer('{"choices": []}'),
    "no text": Answer('{"choices": [{"message": {"content": null}}]}'),
    "not gzip": says(score(2), headers={"content-encoding": "gzip"}),
    "deep": Answer("[" * 100_000),
    "prose": says("je ne sais pas"),
    "out of range": says(score(10_000)),
    "slow": says(score(2), after_s=0.3),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_passing_trouble_is_tried_again_and_in_the_end_unanswered(serve: Serve, trouble: str) -> None:
    recovering = serve(lambda n, _: TROUBLES[trouble] if n < 2 else says(score(2)))

    async def recover(endpoint: Endpoint) -> None:
        assert await endpoint.ask(question(2), parse) == 2
        assert endpoint.stats().retried == 2 and endpoint.stats().calls == len(recovering.received) == 3

    timeout_s = 0.1 if trouble == "slow" else 5
    using(recovering.url, recover, retries=2, timeout_s=timeout_s)
    lasting = serve(lambda n, _: TROUBLES[trouble])
    with pytest.raises(Unanswered, match=r".+ \(2 tries\)$"):
        using(lasting.url, ask(question(2)), retries=1, timeout_s=timeout_s)
    assert len(lasting.received) == 2


def test_a_reply_that_comes_twice_is_not_taken_for_the_next_ones(serve: Serve) -> None:
    server = serve(lambda n, received: says(score(number_of(received)), trouble="twice"))
    assert using(server.url, ask_all(*range(20)), concurrency=1) == list(range(20))


def test_an_answer_that_was_cut_off_is_said_to_be(serve: Serve) -> None:
    server = serve(lambda n, _: says('{"sco', finish_reason="length"))
    with pytest.raises(Unanswered, match="cut off at 512 tokens: no score"):
        using(server.url, ask(question(0)), retries=0)
    complete = serve(lambda n, _: says(score(3), finish_reason="length"))
    assert using(complete.url, ask(question(3)), retries=0) == 3


def test_an_unreadable_answer_is_asked_for_with_another_seed(serve: Serve) -> None:
    server = serve(lambda n, _: [says("?"), Answer("", 500), says("?"), says(score(1))][n])
    using(server.url, ask(question(1, seed=4)))
    seeds = [received.body["seed"] for received in server.received]
    assert seeds[0] == 4 and len(set(seeds)) == 3 and seeds[1] == seeds[2]


def test_no_server_is_unanswered() -> None:
    with pytest.raises(Unanswered, match="ConnectError"):
        using("http://localhost:1/v1", ask(question(0)), retries=0)


@pytest.mark.parametrize(
    "refusal",
    [
        *(Answer("Incorrect key sk-secret", status) for status in (400, 401, 403, 404, 301)),
        Answer(json.dumps({"error": {"message": "You owe us sk-secret.", "code": "insufficient_quota"}}), 429),
    ],
    ids=lambda refusal: str(refusal.status),
)
def test_what_cannot_pass_ends_the_run_without_showing_the_key(serve: Serve, refusal: Answer) -> None:
    server = serve(lambda n, _: refusal)
    with pytest.raises(RuntimeError, match=rf"refused with HTTP {refusal.status}; check .* TEST_KEY") as error:
        using(server.url, ask(question(0)))
    assert "sk-secret" not in str(error.value) and "***" in str(error.value)
    assert len(server.received) == (2 if refusal.status == 400 else 1)  # a 400 might have been about the seed


def test_the_key_is_not_shown_by_what_may_pass_either(serve: Serve) -> None:
    server = serve(lambda n, _: says("my key is sk-secret"))
    with pytest.raises(Unanswered, match=r"my key is \*\*\*"):
        using(server.url, ask(question(0)), retries=0)


def test_a_request_that_is_refused_among_others_is_unanswered(serve: Serve) -> None:
    server = serve(lambda n, received: Answer("too long", 400) if number_of(received) else says(score(0)))

    async def both(endpoint: Endpoint) -> None:
        await endpoint.ask(question(0), parse)
        with pytest.raises(Unanswered, match="refused with HTTP 400: too long"):
            await endpoint.ask(question(1), parse)

    using(server.url, both)
    assert len(server.received) == 2 and "seed" in server.received[1].body


def test_the_key_is_needed_except_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(
        ValueError, match=r"set the environment variable TEST_KEY to the key of https://api\.example/v1"
    ):
        using("https://api.example/v1", ask(question(0)))
    monkeypatch.setenv("TEST_KEY", "sk-sec\nret")
    with pytest.raises(ValueError, match=r"the key in TEST_KEY holds characters that no key has$"):
        using("https://api.example/v1", ask(question(0)))
    with pytest.raises(ValueError, match=r"must look like https://host/v1, not 'api\.example'"):
        using("api.example", ask(question(0)))


# Limits


def test_requests_are_bounded_and_a_place_is_free_while_one_waits_to_try_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 1.0)
    order: list[int] = []

    def answer(n: int, received: Received) -> Answer:
        order.append(number_of(received))
        return Answer("", 500) if n == 0 else says(score(number_of(received)), after_s=0.05)

    server = serve(answer)
    # Six after one another take longer than `timeout_s`: waiting for a place is no time-out.
    assert using(server.url, ask_all(*range(6)), concurrency=1, timeout_s=0.2) == list(range(6))
    assert order == [0, 1, 2, 3, 4, 5, 0] and server.most_at_once == 1
    assert server.received[-1].at - server.received[0].at > 0.5  # at least half of FIRST_WAIT_S
    using(server.url, ask_all(*range(10, 20)), concurrency=4)
    assert server.most_at_once == 4


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_holds_everybody_back(serve: Serve, as_date: bool) -> None:
    def answer(n: int, received: Received) -> Answer:
        wait = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True) if as_date else "0.5"
        return Answer("", 429, {"retry-after": wait}) if n == 0 else echo(n, received)

    server = serve(answer)
    assert using(server.url, ask_all(*range(5)), concurrency=1) == list(range(5))
    first, *others = (received.at for received in server.received)
    assert min(others) - first > (0.9 if as_date else 0.5)  # a date has whole seconds


def test_a_busy_endpoint_serves_everybody_in_turn(serve: Serve) -> None:
    """It takes one request in 20 ms: most tries fail, which says nothing against the request."""
    free_at = [0.0]

    def answer(n: int, received: Received) -> Answer:
        now = time.monotonic()
        if now < free_at[0]:
            return Answer("", 429)
        free_at[0] = now + 0.02
        return echo(n, received)

    server = serve(answer)
    assert using(server.url, ask_all(*range(30)), concurrency=8, retries=3) == list(range(30))
    assert len(server.received) > 60


def test_a_bucket_keeps_the_rate_and_no_minute_sees_much_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(limits, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bucket, taken = Bucket(600), 0
    while now[0] < 60:
        wait_s = bucket.wait_s(1)
        if wait_s:
            now[0] += wait_s + 1e-6
        else:
            bucket.take(1)
            taken += 1
    assert 600 <= taken <= 661
    now[0] += 60
    bucket.take(200)  # more than it holds: allowed when it is full, and paid back
    assert bucket.wait_s(1) == pytest.approx((200 - 60 + 1) / 10)
    bucket.take(-150)
    assert bucket.wait_s(1) == 0


def test_requests_and_tokens_a_minute_are_kept_below_their_limits(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BURST", 0.0)
    server = serve(lambda n, received: says(score(number_of(received)), prompt_tokens=90, completion_tokens=10))

    def seconds(**fields: Any) -> float:
        before = len(server.received)
        using(server.url, ask_all(*range(8)), **fields)
        times = [received.at for received in server.received[before:]]
        return max(times) - min(times)

    assert seconds(requests_per_minute=1500) > 0.2  # 7 * 0.04 s, seen by another clock
    # 517 tokens are expected of each, 0.52 s, of which all but 100 are given back as soon as it is answered.
    assert 0.65 < seconds(tokens_per_minute=60_000) < 2.5


# Budget


def spending(number: int) -> Answer:
    return says(score(number), prompt_tokens=1000, completion_tokens=500, after_s=0.02)


@pytest.mark.parametrize(
    ("budget", "sent"),
    [
        ({"max_calls": 7}, 7),
        ({"max_tokens": 10_000}, 7),  # 1,500 each
        ({"max_cost": 0.01, "prompt_price": 0.5, "completion_price": 2.0}, 7),  # 0.0015 each
    ],
)
def test_a_budget_counts_over_runs_and_what_was_bought_is_kept(
    serve: Serve, tmp_path: Path, budget: dict[str, Any], sent: int
) -> None:
    server = serve(lambda n, received: spending(number_of(received)))
    store = tmp_path / "answers.sqlite"
    assert using(server.url, ask_all(0, 1, 2), store, concurrency=1, **budget) == [0, 1, 2]
    results = using(server.url, ask_all(*range(20)), store, concurrency=1, **budget)
    assert results[:sent] == list(range(sent)) and len(server.received) == sent
    assert all(isinstance(result, BudgetSpent) for result in results[sent:])
    assert "the budget is spent" in str(results[-1]) and next(iter(budget)) in str(results[-1])
    assert using(server.url, ask_all(*range(sent)), store, **budget) == list(range(sent))
    more = {**budget, next(iter(budget)): 100 * next(iter(budget.values()))}
    assert using(server.url, ask_all(*range(20)), store, **more) == list(range(20))


def test_a_budget_of_calls_is_never_exceeded_and_those_under_way_finish(serve: Serve) -> None:
    server = serve(lambda n, received: spending(number_of(received)))
    results = using(server.url, ask_all(*range(30)), concurrency=8, max_calls=11)
    assert len(server.received) == 11 and sum(isinstance(result, int) for result in results) == 11


def test_the_runs_own_store_holds_its_budget_where_a_cache_serves_several_runs(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda n, received: spending(number_of(received)))
    fields = {"cache": tmp_path / "cache.sqlite", "max_calls": 3}
    assert using(server.url, ask_all(0, 1, 2), tmp_path / "a.sqlite", **fields) == [0, 1, 2]
    assert using(server.url, ask_all(*range(6)), tmp_path / "b.sqlite", **fields) == list(range(6))


def test_what_was_spent_is_what_the_endpoint_says(serve: Serve, tmp_path: Path) -> None:
    answers = [Answer("", 500), says("?", prompt_tokens=11, completion_tokens=2), says(score(0), 11, 4)]
    server = serve(lambda n, _: answers[n])
    store = tmp_path / "answers.sqlite"

    async def once(endpoint: Endpoint) -> None:
        await endpoint.ask(question(0), parse)
        stats = endpoint.stats()
        assert (stats.calls, stats.prompt_tokens, stats.completion_tokens) == (3, 22, 6)
        assert stats.cost == pytest.approx(22 * 2 + 6 * 3)

    using(server.url, once, store, prompt_price=2e6, completion_price=3e6)
    assert sqlite3.connect(store).execute("SELECT * FROM usage").fetchone() == (3, 22, 6, pytest.approx(62))


# Hedging


def test_a_straggler_is_asked_for_again_and_the_loser_is_cancelled(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HEDGE_FLOOR_S", 0.1)
    slow: Counter[int] = Counter()

    def answer(n: int, received: Received) -> Answer:
        number = number_of(received)
        slow[number] += 1
        straggles = number >= 40 and slow[number] == 1
        return says(score(number), after_s={42: 0.7}.get(number, 20) if straggles else 0.01)

    async def ask_stragglers(endpoint: Endpoint) -> None:
        await ask_all(*range(40))(endpoint)
        start = time.monotonic()
        assert await ask_all(40, 41)(endpoint) == [40, 41]
        assert time.monotonic() - start < 10
        stats = endpoint.stats()
        assert (stats.calls, stats.hedged, stats.retried) == (44, 2, 0) and len(server.received) == 44
        # 3 of 46 would be more than one in twenty.
        assert await endpoint.ask(question(42), parse) == 42
        assert endpoint.stats().hedged == 2 and len(server.received) == 45

    server = serve(answer)
    using(server.url, ask_stragglers, concurrency=4)
    assert [number_of(received) for received in server.received if received.hung_up] == [40, 41]


def test_nothing_is_hedged_that_fails_or_should_not_be(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEDGE_FLOOR_S", 0.1)

    def answer(n: int, received: Received) -> Answer:
        return says(score(number_of(received)), after_s=0.7 if n == 40 else 0)

    for fields in ({"hedge": False}, {"max_calls": 41}):
        server = serve(answer)

        async def ask_straggler(endpoint: Endpoint) -> None:
            await ask_all(*range(40))(endpoint)
            assert await endpoint.ask(question(40), parse) == 40
            assert endpoint.stats().hedged == 0

        using(server.url, ask_straggler, concurrency=4, **fields)
        assert len(server.received) == 41


# Answers that are kept


def test_equal_requests_share_a_call_while_it_is_under_way_and_afterwards(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda n, _: says(score(n), after_s=0.05))

    async def twice(endpoint: Endpoint) -> None:
        assert await ask_all(0, 0, 0)(endpoint) == [0, 0, 0]
        assert await endpoint.ask(question(0), parse) == 0
        assert endpoint.stats().cached == 3 and endpoint.stats().calls == 1

    using(server.url, twice, tmp_path / "answers.sqlite")
    assert using(server.url, ask(question(0)), tmp_path / "answers.sqlite") == 0  # another run
    changes = [
        {"name": "n"}, {"system": "x"}, {"user": "x"}, {"version": "2"}, {"temperature": 0.5}, {"top_p": 0.5},
        {"max_tokens": 9}, {"seed": 1}, {"schema": SCHEMA},
    ]  # fmt: skip
    fields = {"name": "m", "system": "You score.", "user": "question 0", "version": "1"}
    for expected, change in enumerate(changes, start=1):
        changed = Request(**{**fields, **change})
        assert using(server.url, ask(changed), tmp_path / "answers.sqlite") == expected, change


def test_only_answers_that_can_be_read_are_kept(serve: Serve, tmp_path: Path) -> None:
    server = serve(lambda n, _: says("?" if n < 2 else score(n)))
    store = tmp_path / "new" / "answers.sqlite"
    with pytest.raises(Unanswered):
        using(server.url, ask(question(0)), store, retries=1)
    assert using(server.url, ask(question(0)), store) == 2

    def parse_better(text: str) -> int:  # as when the parser changed and the wording did not
        if parse(text) == 2:
            raise Unanswered("not any more")
        return parse(text)

    assert using(server.url, lambda endpoint: endpoint.ask(question(0), parse_better), store) == 3
    assert using(server.url, lambda endpoint: endpoint.ask(question(0), parse_better), store) == 3
    assert len(server.received) == 4


def test_replay_asks_nobody(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "answers.sqlite"
    with pytest.raises(ValueError, match="no recorded answers at"):
        using(None, ask_all(0), cache=cache, replay=True)
    using(serve(echo).url, ask_all(0, 1, 2), cache=cache)
    monkeypatch.delenv("TEST_KEY")
    cache.chmod(0o444)
    store = tmp_path / "run.sqlite"
    assert using("https://nowhere.example/v1", ask_all(0, 1, 2), store, cache=cache, replay=True) == [0, 1, 2]
    assert not store.exists()
    with pytest.raises(RuntimeError, match=r"answers.sqlite holds no answer .* \(3 others of m .* 'question 3'"):
        using(None, ask(question(3)), cache=cache, replay=True)


@pytest.mark.parametrize("damage", ["text", "foreign", "truncated", "overwritten", "folder"])
def test_a_file_that_is_no_cache_is_a_mistake_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "answers.sqlite"
    if damage == "text":
        path.write_text("not a database at all" * 100)
    elif damage == "foreign":
        sqlite3.connect(path).execute("CREATE TABLE recipes (name TEXT)").connection.commit()
    elif damage == "folder":
        path.mkdir()
    else:

        async def fill() -> None:
            store = Store(path)
            await asyncio.gather(*(store.keep(f"{n}", "m", "1", "x" * 900, None) for n in range(200)))
            await store.close()

        asyncio.run(fill())
        whole = path.read_bytes()
        half = len(whole) // 2
        path.write_bytes(whole[:half] if damage == "truncated" else whole[:half] + b"\1" * 9000 + whole[half + 9000 :])
    with pytest.raises(ValueError, match=rf"^{path} [^\n]*name another file$"):
        Store(path)


def test_the_event_loop_goes_on_while_another_process_writes(serve: Serve, tmp_path: Path) -> None:
    server, path = serve(echo), tmp_path / "answers.sqlite"
    using(server.url, ask_all(0), path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")

    async def while_locked(endpoint: Endpoint) -> int:
        asked = asyncio.create_task(endpoint.ask(question(1), parse))
        start = time.monotonic()
        longest = 0.0
        while time.monotonic() - start < 0.3:
            before = time.monotonic()
            await asyncio.sleep(0.001)
            longest = max(longest, time.monotonic() - before)
        assert not asked.done() and longest < 0.15
        other.execute("COMMIT")
        return await asked

    other.execute("COMMIT")

    async def lock_after_opening(endpoint: Endpoint) -> int:
        other.execute("BEGIN EXCLUSIVE")
        return await while_locked(endpoint)

    assert using(server.url, lock_after_opening, path) == 1


TWO_PROCESSES = """
import json, sys
from pathlib import Path
_, tests, url, store, start = sys.argv
sys.path.insert(0, tests)
from test_endpoint import ask_all, using
answers = using(url, ask_all(*range(int(start), int(start) + 100)), Path(store), concurrency=8, max_calls=120)
print(json.dumps([answer if isinstance(answer, int) else type(answer).__name__ for answer in answers]))
"""


def test_two_processes_share_answers_and_budget(serve: Serve, tmp_path: Path) -> None:
    """Each answer is another one, so that it shows who got which; 50 of 150 questions are asked by both."""
    server = serve(lambda n, received: says(score(n), after_s=0.02))
    arguments = [str(Path(__file__).parent), server.url, str(tmp_path / "answers.sqlite")]
    command = [sys.executable, "-c", TWO_PROCESSES, *arguments]
    processes = [subprocess.Popen([*command, start], stdout=subprocess.PIPE, text=True) for start in ("0", "50")]
    first, second = (json.loads(process.communicate(timeout=60)[0]) for process in processes)
    assert len(server.received) == 120
    both = [pair for pair in zip(first[50:], second[:50], strict=True) if "BudgetSpent" not in pair]
    assert all(one == other for one, other in both)
    assert {*first, *second} <= {*range(120), "BudgetSpent"} and "BudgetSpent" in {*first, *second}


# Cancellation


def test_a_cancelled_request_frees_its_place_and_leaves_nothing_behind(serve: Serve) -> None:
    server = serve(lambda n, received: says(score(number_of(received)), after_s=0.05 if number_of(received) else 10))

    async def cancel(endpoint: Endpoint) -> None:
        lasting = [asyncio.create_task(endpoint.ask(question(0), parse)) for _ in range(2)]
        waiting = asyncio.create_task(endpoint.ask(question(1), parse))
        await asyncio.sleep(0.1)
        lasting[0].cancel()
        waiting.cancel()
        await asyncio.gather(lasting[0], waiting, return_exceptions=True)
        assert not lasting[1].done(), "whoever shares a request keeps it"
        lasting[1].cancel()
        await asyncio.gather(lasting[1], return_exceptions=True)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert await asyncio.wait_for(endpoint.ask(question(2), parse), 5) == 2

    using(server.url, cancel, concurrency=1)
    assert [number_of(received) for received in server.received] == [0, 2] and server.received[0].hung_up


def test_closing_ends_what_is_under_way(serve: Serve) -> None:
    server = serve(lambda n, _: says(score(0), after_s=10))

    async def leave(endpoint: Endpoint) -> None:
        asked = asyncio.create_task(endpoint.ask(question(0), parse))
        await asyncio.sleep(0.05)
        await endpoint.close()
        with pytest.raises(asyncio.CancelledError):
            await asked

    async def main() -> None:
        await leave(Endpoint(EndpointConfig(url=server.url, api_key_env="TEST_KEY"), None))

    asyncio.run(asyncio.wait_for(main(), 5))


# All of it at once


class Plan:
    """One in three of the first tries goes wrong, each time in another way. `ideal_s` is what it has to take."""

    troubles = (
        "hang",
        "busy",
        "500",
        "503",
        "reset",
        "cut",
        "twice",
        "malformed",
        "list",
        "prose",
        "out of range",
        "short",
    )

    def __init__(
        self, service_s: float, timeout_s: float, pause_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._service_s, self._timeout_s, self._pause_s, self._now = service_s, timeout_s, pause_s, now
        self._tries: Counter[int] = Counter()
        self._busy_until = 0.0
        self.served_s = self.paused_s = 0.0
        self.seen: Counter[str] = Counter()

    def ideal_s(self, concurrency: int) -> float:
        """All places always taken, but for the pauses that were asked for."""
        return self.served_s / concurrency + self.paused_s

    def answer(self, n: int, received: Received) -> Answer:
        number, now = number_of(received), self._now()
        if now < self._busy_until:
            return Answer("", 429, {"retry-after": f"{self._busy_until - now:.3f}"})
        self._tries[number] += 1
        rng = random.Random(f"{number} {self._tries[number]}")
        trouble = rng.choice(self.troubles) if self._tries[number] <= 4 and rng.random() < 1 / 3 else ""
        self.seen[trouble] += 1
        if trouble == "busy" and self.seen["busy"] % 6 == 1:
            self._busy_until = now + self._pause_s
            self.paused_s += self._pause_s
            return Answer("", 429, {"retry-after": f"{self._pause_s}"})
        after_s = rng.uniform(0.5, 1.5) * self._service_s
        self.served_s += self._timeout_s if trouble == "hang" else after_s
        if trouble == "hang":
            return says(score(number), after_s=60)
        if trouble == "short":
            return says('{"sco', finish_reason="length", after_s=after_s)
        if trouble in ("reset", "cut", "twice"):
            return says(score(number), trouble=trouble, after_s=after_s)
        if trouble in TROUBLES:
            return replace(TROUBLES[trouble], after_s=after_s)
        return says(score(number), after_s=after_s)


def test_an_endpoint_that_does_everything_wrong(serve: Serve, tmp_path: Path) -> None:
    plan = Plan(service_s=0.005, timeout_s=1, pause_s=0.1)
    server, store = serve(plan.answer), tmp_path / "answers.sqlite"

    async def ask_them(endpoint: Endpoint) -> list[Any]:
        answers = await ask_all(*range(250))(endpoint)
        stats = endpoint.stats()
        assert stats.calls == len(server.received) == 250 + stats.retried + stats.hedged
        return answers

    assert using(server.url, ask_them, store, timeout_s=1) == list(range(250))
    assert all(plan.seen[trouble] for trouble in plan.troubles)
    asked = len(server.received)
    assert using(server.url, ask_all(*range(250)), store) == list(range(250))
    assert len(server.received) == asked
    database = sqlite3.connect(store)
    assert database.execute("SELECT count(*) FROM answers").fetchone() == (250,)
    assert database.execute("SELECT calls FROM usage").fetchone() == (asked,)


class Clock(selectors.DefaultSelector):
    """Makes an event loop jump to its next timer instead of waiting, unless something else is ready."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(None if timeout is None else 0)
        if not ready and timeout is not None:
            self.now += timeout
        return ready


def test_a_thousand_requests_take_the_time_of_the_service_and_of_the_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In simulated time, so that a machine that does something else as well cannot fail it: no network, no waiting."""
    clock = Clock()
    loop = asyncio.SelectorEventLoop(clock)
    monkeypatch.setattr(loop, "time", lambda: clock.now)
    simulated = SimpleNamespace(monotonic=lambda: clock.now)
    monkeypatch.setattr(limits, "time", simulated)
    monkeypatch.setattr(client, "time", simulated)
    plan = Plan(service_s=0.5, timeout_s=1.5, pause_s=1.0, now=lambda: clock.now)
    sent: list[Received] = []

    async def post(_: Any, url: str, body: dict[str, Any], timeout_s: float) -> httpx.Response:
        sent.append(Received(body, {}, url, clock.now))
        answer = plan.answer(0, sent[-1])
        await asyncio.sleep(min(answer.after_s, timeout_s))
        if answer.after_s > timeout_s or answer.trouble in ("reset", "cut"):
            raise wire.Failed("no answer")
        return httpx.Response(answer.status, headers=dict(answer.headers), text=answer.body)

    monkeypatch.setattr(wire, "post", post)

    async def seconds() -> float:
        endpoint = Endpoint(EndpointConfig(url="http://localhost/v1", concurrency=16, timeout_s=1.5), None)
        assert await ask_all(*range(1000))(endpoint) == list(range(1000))
        took_s = clock.now
        assert endpoint.stats().calls == len(sent)
        await endpoint.close()
        return took_s

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        ratio = runner.run(seconds()) / plan.ideal_s(16)
    assert 0.9 < ratio < 1.15  # below 1: while they pause, those under way finish
