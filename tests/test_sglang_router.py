"""What may stand at `engine.urls`: SGLang servers, a router in front of them, and what is neither.

All are scripted (`scripted_sglang`); a real router in front of a real server is in `test_sglang_live`.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from scripted_sglang import Answer, Body, ScriptedRouter, ScriptedServer

from negotiator import train
from negotiator.engines.sglang_http import find_servers

Scripted = TypeVar("Scripted", bound=ScriptedServer)
Keep = Callable[[Scripted], Scripted]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Stops what it is given when the test ends."""
    with contextlib.ExitStack() as stack:

        def keep(scripted: Scripted) -> Scripted:
            stack.callback(scripted.stop)
            return scripted

        yield keep


def answering(status: int, answer: Any, *paths: str) -> Callable[[ScriptedServer, str, Body], Answer | None]:
    """As `trouble` of a server: the same answer to some paths, or to all."""
    return lambda server, path, body: (status, answer) if not paths or path in paths else None


def refusal(*urls: str) -> str:
    with pytest.raises(ValueError) as caught:
        find_servers(urls)
    return str(caught.value)


def test_servers_stand_for_themselves(keep: Keep) -> None:
    first, second = keep(ScriptedServer()), keep(ScriptedServer())
    assert find_servers([]) == []
    assert find_servers([f"{second.url}/", first.url]) == [second.url, first.url]


def test_a_router_stands_for_its_healthy_workers(keep: Keep, caplog: pytest.LogCaptureFixture) -> None:
    first, second, ill = keep(ScriptedServer()), keep(ScriptedServer()), keep(ScriptedServer())
    in_order = sorted([first.url, second.url])
    router = keep(ScriptedRouter(ill.url, in_order[1], f"{in_order[0]}/"))
    router.healthy[ill.url] = False
    with caplog.at_level(logging.WARNING):
        assert find_servers([f"{router.url}/"]) == in_order
    assert caplog.messages == [f"{ill.url} is left out: the router at {router.url} says that it is not healthy"]
    assert not ill.calls and router.paths() == ["/workers"]


def test_a_server_under_several_urls_is_used_once(keep: Keep) -> None:
    first, second = keep(ScriptedServer()), keep(ScriptedServer())
    router, another = keep(ScriptedRouter(first.url, second.url)), keep(ScriptedRouter(second.url))
    alias = f"http://localhost:{first.port}"
    assert find_servers([router.url, first.url, alias, another.url]) == sorted([first.url, second.url])
    assert find_servers([alias, router.url]) == [alias, second.url]
    # A router that tells ranks apart lists a server once for each.
    ranks = keep(ScriptedRouter(f"{first.url}@0", f"{first.url}@1"))
    assert find_servers([ranks.url]) == [first.url]
    # A server that does not say how long it took to start is known by its URL.
    for server in (first, second):
        silent = server.server_info({})[1]
        del silent["startup_time"]
        server.trouble = answering(200, silent, "/server_info")
    assert find_servers([router.url, first.url]) == sorted([first.url, second.url])


def test_a_router_without_healthy_workers_is_refused(keep: Keep) -> None:
    server = keep(ScriptedServer())
    router = keep(ScriptedRouter())
    advice = "start servers and add them to it, or name servers in engine.urls"
    assert refusal(router.url) == f"the router at {router.url} has no healthy worker among its 0: {advice}"
    router.healthy[server.url] = False
    assert refusal(router.url) == f"the router at {router.url} has no healthy worker among its 1: {advice}"


def test_a_worker_that_cannot_be_reached_from_here_is_refused(keep: Keep) -> None:
    server, gone = keep(ScriptedServer()), ScriptedServer()
    gone.stop()
    for worker in (gone.url, f"grpc://127.0.0.1:{server.port}"):
        router = keep(ScriptedRouter(server.url, worker))
        start = f"no SGLang server answers at {worker} (a worker of the router at {router.url}), see engine.urls: "
        assert refusal(router.url).startswith(start)
    gone.start()
    keep(gone).trouble = answering(503, "starting")
    assert refusal(keep(ScriptedRouter(gone.url)).url).startswith(f"{gone.url} (a worker of the router at ")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"disaggregation_mode": "prefill"},
            "{} does only the prefill part of requests: start it without --disaggregation-mode",
        ),
        (
            {"disaggregation_mode": "decode"},
            "{} does only the decode part of requests: start it without --disaggregation-mode",
        ),
        (
            {"dp_size": 2},
            "{} computes with 2 data-parallel copies, to which SGLang hands no new weights: start 2 servers instead",
        ),
    ],
)
def test_servers_that_cannot_be_trained_with_are_refused(keep: Keep, changes: Body, sentence: str) -> None:
    server = keep(ScriptedServer())
    server.trouble = answering(200, server.server_info({})[1] | changes, "/server_info")
    router = keep(ScriptedRouter(server.url))
    assert refusal(server.url) == sentence.format(server.url)
    assert refusal(router.url) == sentence.format(f"{server.url} (a worker of the router at {router.url})")


def test_whatever_is_neither_server_nor_router_is_refused(keep: Keep) -> None:
    server = keep(ScriptedServer())
    router = keep(ScriptedRouter(server.url))
    for status, answer in ((200, "<!doctype html>"), (200, []), (200, {"workers": 3}), (500, {"error": "no"})):
        server.trouble = answering(status, answer)
        said = f"{server.url} answers like no SGLang server or router (HTTP {status}); see engine.urls"
        assert refusal(server.url) == said
    for status, answer in ((404, {"detail": "Not Found"}), (200, router.server_info({})[1]), (200, "ok")):
        server.trouble = answering(status, answer, "/server_info")
        assert refusal(server.url) == f"{server.url} answers like no SGLang server (HTTP {status}); see engine.urls"
    # Behind its key a router still tells everybody `/server_info`.
    router.trouble = answering(401, "Invalid API key", "/workers")
    assert refusal(router.url) == f"{router.url} answers like no SGLang server or router (HTTP 401); see engine.urls"
    for url in ("localhost:1", "http://localhost:port", "http://127.0.0.1:1"):
        assert re.match(rf"no SGLang server answers at {re.escape(url)}, see engine\.urls: .", refusal(url))


def test_the_command_says_so_before_it_loads_or_writes_anything(
    keep: Keep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    router = keep(ScriptedRouter())
    options = ["--runs", str(tmp_path), "--engine.kind", "sglang", "--engine.urls", f"[{router.url}]"]
    assert train.main(options) == 2
    assert re.fullmatch(rf"error: the router at {router.url} has no healthy worker .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())
