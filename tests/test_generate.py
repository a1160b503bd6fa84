"""Data generation against a real server on this machine that answers well and badly, and on a tiny model."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from negotiator import data
from negotiator.data.__main__ import main as data_command
from negotiator.generate import filters
from negotiator.generate.__main__ import main
from negotiator.generate.filters import Known, refusal
from negotiator.generate.items import (
    KINDS,
    Kind,
    cells,
    draft_of,
    examples,
    from_json,
    from_plain,
    json_schema,
    to_plain,
)

COMMON = (
    "the a of in to and that for with on by from at or so if as but not is was are had has will would could should "
    "can may they she he it we you her his their our my this there what when which who"
)
SERVER_MISTAKE = 500, "no"


def passage(seed: int, words: int = 60) -> str:
    """Has the form of English, and nothing in common with any other seed's."""
    rng = random.Random(seed)
    made_up = ("".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(4)) for _ in itertools.count())
    text = " ".join(rng.choice(COMMON.split()) if i % 2 else next(made_up) for i in range(words - 4))
    return f"{text.capitalize()}. What is to be?"[:1000].replace("What is", f"What {next(made_up)} is")


def persona(seed: int, words: int = 50) -> str:
    return f"You and your {passage(seed, words)}".replace(" i ", " a ").replace(" my ", " a ")


def good(kind: Kind, seed: int) -> dict[str, str]:
    draft = {"text": passage(seed)}
    if kind in ("personas", "eval_conflict"):
        draft |= {"name_a": f"Giver {seed}", "persona_a": persona(seed + 10_000)}
        draft |= {"name_b": f"Taker {seed}", "persona_b": persona(seed + 20_000)}
    if kind == "personas":
        draft["tension"] = f"giving {seed} vs taking {seed}"
        del draft["text"]
    return draft


class Server:
    """Answers its n-th request with `answer(n)`: a status and, for 200, the message's content."""

    def __init__(self) -> None:
        self.answer: Callable[[int], tuple[int, str]] = lambda n: SERVER_MISTAKE
        self.requests: list[dict[str, Any]] = []
        server, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                status, content = server.answer(number)
                reply = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def options(self, *more: str) -> list[str]:
        url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        return ["--url", url, "--name", "scripted", "--concurrency", "1", "--retries", "0", "--hedge", "false", *more]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_bad_answers_are_refused_each_for_its_reason(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "my.jsonl"
    shipped = data.load_dilemmas()[700].text
    script = [
        json.dumps(good("dilemmas", 0)),
        json.dumps(good("dilemmas", 0)),  # twice
        json.dumps({"text": passage(1, 20)}),  # short
        json.dumps({"text": "Две соседки делят сад и не могут решить. " * 8 + "?"}),
        '{"text": "' + passage(2),  # cut off
        json.dumps({"text": f"Then {shipped}"}),
        json.dumps({"text": passage(3).replace("?", ".")}),
        json.dumps({"text": passage(4) + "<|im_end|>?"}),
        *(f"Here it is: ```json\n{json.dumps(good('dilemmas', n))}\n```" for n in (5, 6)),
    ]
    on_disk: list[int] = []

    def answer(number: int) -> tuple[int, str]:
        on_disk.append(len(lines(out)) + len(lines(tmp_path / "my.refused.jsonl")))
        return 200, script[number]

    server.answer = answer
    assert main(["dilemmas", "--count", "3", "--out", str(out), *server.options()]) == 0

    assert on_disk == list(range(10))  # every answer is written before the next one is asked for
    printed = capsys.readouterr().out
    reasons = [filters.DUPLICATE, filters.LENGTH, filters.GARBAGE, filters.UNREADABLE, filters.LIKE_ITEM]
    reasons += [filters.NO_QUESTION, filters.MARKUP]
    assert [line["reason"] for line in lines(tmp_path / "my.refused.jsonl")] == reasons
    assert "asked 10, kept 3 of 3, refused 7" in printed and all(f"  {reason}: 1\n" in printed for reason in reasons)
    assert "everyday 1, interpersonal 1, professional 1" in printed and "3 cells with 1 to 1 items" in printed

    dilemmas = data.load_dilemmas(out)
    assert [d.text for d in dilemmas] == [passage(n) for n in (0, 5, 6)]
    assert [(d.category, d.domain) for d in dilemmas] == [(c.category, c.domain) for c in cells("dilemmas")[:3]]
    assert data_command(["check", str(out)]) == 0
    assert "written by: scripted 3" in capsys.readouterr().out
    assert [line["source"]["seed"] for line in lines(out)] == [server.requests[n]["seed"] for n in (0, 8, 9)]
    assert len({request["seed"] for request in server.requests}) == 10
    for request in server.requests:
        assert request["response_format"]["json_schema"]["schema"] == json_schema("dilemmas")
    asked = [request["messages"][1]["content"] for request in server.requests]
    assert str(cells("dilemmas")[0]).capitalize() in asked[0]
    shown = [[d for d in data.load_dilemmas() if json.dumps(d.text, ensure_ascii=False) in user] for user in asked]
    assert {len(own) for own in shown} == {3} and len({d.id for own in shown for d in own}) > 15
    slots = [0] + [1] * 8 + [2]
    assert [{d.category for d in own} for own in shown] == [{cells("dilemmas")[slot].category} for slot in slots]


@pytest.mark.parametrize("kind", KINDS)
def test_files_have_the_shipped_format(server: Server, tmp_path: Path, kind: Kind) -> None:
    server.answer = lambda n: (200, json.dumps(good(kind, n)))
    out = tmp_path / "my.jsonl"
    name, _, chosen = kind.partition("_")
    more = ["--set", chosen] if chosen == "open" else []
    assert main([name, *more, "--count", "12", "--out", str(out), *server.options("--concurrency", "4")]) == 0
    own, shipped = data.read_records(out), data.read_records(data.SHIPPED[kind])
    extra = {"source", "domain"} if kind == "eval_conflict" else {"source"}
    assert all(record.fields.keys() == shipped[0].fields.keys() | extra for record in own)
    assert {tuple(draft_of(kind, r).items()) for r in own} == {tuple(good_in_order(kind, n).items()) for n in range(12)}
    share = Counter(tuple(record.fields["source"]["cell"]) for record in own)
    assert max(share.values()) == (2 if kind == "eval_open" else 1)
    assert data_command(["check", str(out)]) == 0


def good_in_order(kind: Kind, seed: int) -> dict[str, str]:
    return {field: good(kind, seed)[field] for field in json_schema(kind)["required"]}


def test_ended_anywhere_the_same_command_goes_on(server: Server, tmp_path: Path) -> None:
    out = tmp_path / "my.jsonl"
    command = ["dilemmas", "--count", "4", "--out", str(out), *server.options()]

    # A shell lets what it starts in the background ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted_at_the_fourth(n: int) -> tuple[int, str]:
        if n == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return (200, json.dumps(good("dilemmas", n))) if n != 1 else (200, "?")

    server.answer = interrupted_at_the_fourth
    try:
        assert main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(lines(out)) == 2 and len(lines(tmp_path / "my.refused.jsonl")) == 1

    first = out.read_bytes().splitlines(keepends=True)[0]
    out.write_bytes(first + b'{"id": "dilemmas-0-00001", "te')  # as if it had been killed while it wrote the second
    refused = tmp_path / "my.refused.jsonl"
    refused.write_bytes(refused.read_bytes()[:-1])  # and after all of a line but its end
    server.answer = lambda n: (200, json.dumps(good("dilemmas", n)))
    assert main(command) == 0
    assert out.read_bytes().startswith(first)
    assert [line["id"] for line in lines(out)] == [f"dilemmas-0-{slot:05d}" for slot in range(4)]
    assert len(lines(refused)) == 1 and refused.read_text().endswith("\n")
    asked = len(server.requests)
    assert main(command) == 0 and len(server.requests) == asked  # nothing is left to do
    server.answer = lambda n: (200, json.dumps(good("dilemmas", 0 if n == asked else n)))  # the first run's, once more
    assert main([*command, "--count", "5"]) == 0 and len(server.requests) == asked + 2
    assert len({d.id for d in data.load_dilemmas(out)}) == 5


def test_it_gives_up_after_so_many_tries_and_another_seed_goes_on(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda n: (200, json.dumps({"text": f"Too short {n}?"}))
    command = ["eval", "--count", "2", "--tries", "3", "--out", str(tmp_path / "my.jsonl"), *server.options()]
    assert main(command) == 1
    printed = capsys.readouterr().out
    assert "asked 6, kept 0 of 2, refused 6" in printed and "gave up 2 items after 3 tries each" in printed
    assert main(command) == 1 and len(server.requests) == 6
    server.answer = lambda n: (200, json.dumps(good("eval_conflict", n)))
    assert main([*command, "--seed", "1"]) == 0
    assert "asked 8, kept 2 of 2, refused 6" in capsys.readouterr().out


def test_what_no_try_can_help_ends_it_with_nothing_lost(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    out = tmp_path / "my.jsonl"
    command = ["dilemmas", "--count", "2", "--tries", "20", "--out", str(out), *server.options()]
    assert main(command) == 1  # HTTP 500
    assert "stopped: 10 tries in a row without an answer" in capsys.readouterr().out and len(server.requests) == 10
    server.answer = lambda n: (401, "sk-secret is no key")
    assert main(command) == 1 and "stopped: http" in (printed := capsys.readouterr().out)
    assert "sk-secret" not in printed and len(server.requests) == 11
    server.answer = lambda n: (200, json.dumps(good("dilemmas", n)))
    assert main([*command, "--max_calls", "12"]) == 1 and "stopped: the budget is spent" in capsys.readouterr().out
    assert len(lines(out)) == 1
    assert main(command) == 0 and len(data.load_dilemmas(out)) == 2
    assert not any(b"sk-secret" in file.read_bytes() for file in tmp_path.iterdir())


def test_an_endpoint_that_fails_now_and_then_is_asked_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = lambda n: SERVER_MISTAKE if n % 2 else (200, "?" if n < 22 else json.dumps(good("dilemmas", n)))
    command = ["dilemmas", "--count", "1", "--tries", "23", "--out", str(tmp_path / "my.jsonl"), *server.options()]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "asked 23, kept 1 of 1, refused 11" in printed and "without an answer in this run: 11" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dilemmas", "--url", "http://localhost/v1"], "an endpoint needs --url and --name"),
        (["dilemmas", "--set", "open"], "--set is for eval"),
        (["dilemmas", "--count", "0"], "--count and --tries have to be positive"),
        (["personas", "--retries", "3"], "--retries is for an endpoint"),
        (["dilemmas", "--model.path", "nowhere"], "no model at nowhere"),
        (["dilemmas", "--model.dtype", "fp8"], "model.dtype: input should be 'auto', 'bf16' or 'fp32'"),
        (["eval", "--url", "x", "--name", "y", "--model.path", "z"], "--model.path is for the local model"),
        (["eval", "--url", "x", "--name", "y"], "must look like https://host/v1"),
    ],
)
def test_mistakes_end_with_2_and_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code: object = main(["--count", "1", "--out", str(tmp_path / "my.jsonl"), *arguments])
    except SystemExit as ended:  # what argparse does
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and message in error and error.count("\n") == 1


def test_a_file_of_others_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str], server: Server) -> None:
    out = tmp_path / "my.jsonl"
    out.write_text('{"id": "a", "text": "Mine?"}\n')
    assert main(["dilemmas", "--count", "1", "--out", str(out), *server.options()]) == 2
    assert "my.jsonl:1: not written by this command for dilemmas" in capsys.readouterr().err
    server.answer = lambda n: (200, json.dumps(good("eval_open", n)))
    other = tmp_path / "open.jsonl"
    assert main(["eval", "--set", "open", "--count", "1", "--out", str(other), *server.options()]) == 0
    assert main(["dilemmas", "--count", "1", "--out", str(other), *server.options()]) == 2
    assert out.read_text() == '{"id": "a", "text": "Mine?"}\n'


PAIR, CONFLICT = good("personas", 1), good("eval_conflict", 1)
QUOTED = '"I want my share and I want it now, and it is mine and not for me to ask," you say of your '


@pytest.mark.parametrize(
    ("kind", "draft", "reason"),
    [
        ("personas", PAIR, None),
        ("eval_conflict", CONFLICT, None),
        ("eval_open", {"text": passage(1, 30).replace("?", ".")}, None),
        ("eval_conflict", CONFLICT | {"text": CONFLICT["text"].replace("?", ".")}, filters.NO_QUESTION),
        ("eval_conflict", CONFLICT | {"text": f'She asks: "{CONFLICT["text"]}"'}, None),
        ("personas", PAIR | {"tension": "giving and taking all"}, filters.UNREADABLE),
        ("personas", PAIR | {"name_a": "A name that is far too long for one"}, filters.LENGTH),
        ("personas", PAIR | {"persona_b": persona(5, 120)}, filters.LENGTH),
        ("personas", PAIR | {"name_b": "giver 1!"}, filters.BOTH_ALIKE),
        ("personas", PAIR | {"persona_b": PAIR["persona_a"].replace(" and ", " or ")}, filters.BOTH_ALIKE),
        ("personas", PAIR | {"persona_b": passage(6).replace(" you ", " a ")}, filters.NOT_SECOND_PERSON),
        ("personas", PAIR | {"persona_b": f"I have my own, as I see it. {passage(7)}"}, filters.NOT_SECOND_PERSON),
        ("personas", PAIR | {"persona_b": QUOTED + passage(8, 40).replace(" i ", " a ").replace(" my ", " a ")}, None),
        ("personas", PAIR | {"persona_a": PAIR["persona_a"] + " **Yours**"}, filters.MARKUP),
        ("personas", PAIR | {"name_a": "User: Giver"}, filters.MARKUP),
        ("personas", PAIR | {"persona_a": PAIR["persona_a"] + " You are $name."}, filters.MARKUP),
    ],
)
def test_refusals(kind: Kind, draft: dict[str, str], reason: str | None) -> None:
    assert refusal(kind, draft, [], Known()) == reason


def test_what_is_known_is_not_written_again() -> None:
    known = Known()
    known.add(PAIR.items())
    new = good("personas", 2)
    assert refusal("personas", new, [], known) is None
    assert refusal("personas", new | {"tension": "TAKING 1 versus giving 1"}, [], known) == filters.DUPLICATE
    assert refusal("personas", new | {"persona_b": PAIR["persona_a"].upper()}, [], known) == filters.DUPLICATE
    old = PAIR["persona_a"].split()
    close = " ".join(old[:25] + persona(9).split()[:25])
    assert refusal("personas", new | {"persona_a": close}, [], known) == filters.LIKE_ITEM
    assert refusal("personas", new | {"persona_a": close}, [PAIR], Known()) == filters.LIKE_EXAMPLE
    assert refusal("personas", new | {"persona_a": " ".join(old[:8] + persona(9).split()[:40])}, [PAIR], known) is None


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_items_pass_and_survive_both_forms(kind: Kind) -> None:
    for example in examples(kind):
        assert refusal(kind, example.draft, [], Known()) is None
        assert from_plain(kind, to_plain(example.draft)) == from_json(kind, json.dumps(example.draft)) == example.draft
    for broken in ("", "{", "[1]", "{}", '{"text": 5}', '{"text": " "}'):
        assert from_json(kind, broken) is None


def test_the_first_cells_are_as_balanced_as_the_shipped_data() -> None:
    assert Counter(c.category for c in cells("dilemmas")[:55]) == {
        "professional": 22,
        "interpersonal": 22,
        "everyday": 11,
    }
    assert {(c.category, c.domain) for c in cells("dilemmas")} == {(d.category, d.domain) for d in data.load_dilemmas()}
    assert len(cells("dilemmas")) == 110 and len(cells("eval_open")) == 10


def test_a_local_model_writes_and_is_refused_what_it_cannot(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are random, and so is what it writes: two tasks, two answers of the full length."""
    out = tmp_path / "my.jsonl"
    command = ["eval", "--set", "open", "--count", "2", "--tries", "1", "--out", str(out)]
    assert main([*command, "--model.path", str(tiny_model), "--model.device", "cpu", "--model.dtype", "fp32"]) == 1
    assert "asked 2, kept 0 of 2, refused 2" in capsys.readouterr().out
    refused = lines(tmp_path / "my.refused.jsonl")
    assert all(len(line["answer"]) > 100 for line in refused) and len({line["answer"] for line in refused}) == 2
    assert refused[0]["by"].startswith(f"{tiny_model.name}, prompt ")
