"""The SGLang engine against servers on this machine that misbehave in every way SGLang servers do.

They are scripted (`scripted_sglang`); what the real server does with the same calls is in `test_sglang_live`.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import sys
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scripted_sglang import Answer, Body, ScriptedServer

from negotiator.config import EngineConfig
from negotiator.engines import sglang_fleet, weight_sync
from negotiator.engines.reuse import PerfectCache
from negotiator.engines.sglang import SGLangEngine
from negotiator.engines.sglang_server import ServerSettings
from negotiator.engines.weight_sync import buckets, choose_way
from negotiator.types import SamplingParams

T = TypeVar("T")
PREFIXES = [tuple(range(10 * k, 10 * k + 8)) for k in range(6)]
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5), "c": torch.ones(2, dtype=torch.bfloat16)}
Trouble = Callable[[ScriptedServer, str, Body], Answer | None]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[ScriptedServer]]]:
    monkeypatch.setattr(sglang_fleet, "POLL_S", 0.02)
    started: list[ScriptedServer] = []

    def start(count: int = 1) -> list[ScriptedServer]:
        started.extend(ScriptedServer() for _ in range(count))
        return started[-count:]

    yield start
    for server in started:
        server.stop()
        assert not server.misused


Serve = Callable[..., list[ScriptedServer]]


def run(
    servers: Sequence[ScriptedServer],
    call: Callable[[SGLangEngine], Awaitable[T]],
    tmp_path: Path = Path("/nowhere"),
    weights: dict[str, torch.Tensor] = WEIGHTS,
    **fields: Any,
) -> T:
    """What `call` returns, with an engine that has had its first weights; never longer than 20 s."""

    async def main() -> T:
        defaults = {"sync": "tensor", "request_timeout_s": 5.0, "recovery_timeout_s": 5.0}
        engine = SGLangEngine([s.url for s in servers], EngineConfig(kind="sglang", **defaults | fields), tmp_path)
        try:
            async with asyncio.timeout(20):
                await engine.update_weights(weights.items(), 0)
                return await call(engine)
        finally:
            await engine.close()

    return asyncio.run(main())


def once(path: str, answer: Answer) -> Trouble:
    """Trouble at the next call of `path`."""
    done: list[str] = []

    def trouble(server: ScriptedServer, called: str, body: Body) -> Answer | None:
        if called != path or done:
            return None
        done.append(called)
        return answer

    return trouble


def sampling(seed: int = 0, max_tokens: int = 4, **more: Any) -> SamplingParams:
    return SamplingParams(max_tokens, seed=seed, **more)


# -- what is asked and what comes back ---------------------------------------------------------------------------------


def test_a_request_says_all_that_matters(serve: Serve) -> None:
    (server,) = serve()
    prompt = PREFIXES[0]
    params = SamplingParams(5, temperature=0.7, top_p=0.5, seed=2**62 + 1, stop_ids=(3, 4))
    generation = run([server], lambda engine: engine.generate(prompt, params))
    (call,) = server.generated()
    assert call.body == {
        "input_ids": list(prompt),
        "sampling_params": {
            "max_new_tokens": 5,
            "temperature": 0.7,
            "top_p": 0.5,
            "stop_token_ids": [3, 4],
            "sampling_seed": 2**62 + 1,
            "ignore_eos": False,
        },
        "return_logprob": True,
        "logprob_start_len": -1,
        "extra_key": "0",
    }
    assert len(generation.ids) == 5 and generation.finish_reason == "length" and generation.weight_version == 0
    assert generation.logprobs == tuple(-token / 10 for token in generation.ids)


def test_a_stop_token_is_kept(serve: Serve) -> None:
    (server,) = serve()
    free = run([server], lambda engine: engine.generate(PREFIXES[0], sampling(max_tokens=9)))
    stop = free.ids[5]
    length = free.ids.index(stop) + 1
    stopping = sampling(max_tokens=9, stop_ids=(stop,))
    stopped = run([server], lambda engine: engine.generate(PREFIXES[0], stopping))
    assert (stopped.ids, stopped.finish_reason) == (free.ids[:length], "stop")


def test_next_logprobs_are_in_the_order_asked(serve: Serve) -> None:
    (server,) = serve()
    logprobs = run([server], lambda engine: engine.next_logprobs(PREFIXES[0], [21, 7, 14, 7]))
    assert logprobs == [-3.0, -1.0, -2.0, -1.0]
    (call,) = server.generated()
    assert call.body["sampling_params"]["temperature"] == 0  # greedy: SGLang then leaves the temperature at 1


def said(**meta: Any) -> Answer:
    good = {
        "finish_reason": {"type": "length", "length": 4},
        "output_token_logprobs": [[-1.0, 5, None]] * 4,
        "cached_tokens": 0,
        "weight_version": "0",
    }
    return 200, {"output_ids": [5] * 4, "meta_info": good | meta}


TROUBLE: dict[str, tuple[Answer, str]] = {
    "hang-up": ((0, ""), "RemoteProtocolError"),
    "500": ((500, {"error": {"message": "scheduler died"}}), "HTTP 500: scheduler died"),
    "503": ((503, ""), "HTTP 503"),
    "429": ((429, {"message": "queue full"}), "HTTP 429: queue full"),
    "broken JSON": ((200, '{"output_ids": ['), "broken JSON"),
    "another shape": ((200, {"text": "hi"}), "not an answer"),
    "a list": ((200, []), "not an answer"),
    "abort": (said(finish_reason={"type": "abort", "message": "gone"}), "aborted a request: gone"),
    "old weights": (said(weight_version="7"), "serves weights '7' instead of 0"),
    "restarted": (said(weight_version="default"), "serves weights 'default' instead of 0"),
    "null": (said(output_token_logprobs=[[None, 5, None]] * 4), "not a number"),
    "infinite": (said(output_token_logprobs=[[-1e999, 5, None]] * 4), "not a number"),
    "other tokens": (said(output_token_logprobs=[[-1.0, 6, None]] * 4), "log-probs of 4 others"),
    "too few": (said(output_token_logprobs=[[-1.0, 5, None]] * 3), "log-probs of 3 others"),
}


@pytest.mark.parametrize("name", TROUBLE)
def test_passing_trouble_is_asked_elsewhere_and_the_server_comes_back(serve: Serve, name: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    answer, why = TROUBLE[name]
    servers = serve(2)
    for server in servers:
        server.trouble = once("/generate", answer) if server is servers[0] else server.trouble

    async def main(engine: SGLangEngine) -> list[Any]:
        texts = await asyncio.gather(*(engine.generate(PREFIXES[0], sampling(seed)) for seed in range(6)))
        while "is back" not in caplog.text:
            await asyncio.sleep(0.01)
        again = await asyncio.gather(*(engine.generate(PREFIXES[0], sampling(seed)) for seed in range(6)))
        assert [text.ids for text in again] == [text.ids for text in texts]
        return texts

    texts = run(servers, main)
    assert len({text.ids for text in texts}) == 6
    assert why in caplog.text
    synced = [s.paths().count("/update_weight_version") for s in servers]
    assert synced == [3, 2]  # the first sync, its proof, and the return
    assert servers[0].weights.keys() == WEIGHTS.keys()


def test_a_refusal_is_one_sentence_and_harms_nobody(serve: Serve) -> None:
    (server,) = serve()
    server.trouble = once("/generate", (400, {"error": {"message": "The input (9000 tokens) is\nlonger than 2048."}}))

    async def main(engine: SGLangEngine) -> None:
        with pytest.raises(
            ValueError, match=rf"^{server.url} refused /generate .*: The input \(9000 tokens\) is longer"
        ):
            await engine.generate(PREFIXES[0], sampling())
        await engine.generate(PREFIXES[0], sampling())

    run([server], main)
    assert len(server.generated()) == 2
    assert server.paths().count("/update_weight_version") == 2  # it was never down


def test_a_text_cut_short_says_what_to_change(serve: Serve) -> None:
    (server,) = serve()
    cut = {"output_ids": [5], "meta_info": said()[1]["meta_info"] | {"output_token_logprobs": [[-1.0, 5, None]]}}
    server.trouble = once("/generate", (200, cut))
    with pytest.raises(ValueError, match=r"ended a text of 1 tokens, not 4.*raise engine\.cache_tokens"):
        run([server], lambda engine: engine.generate(PREFIXES[0], sampling()))
    nan = said(finish_reason={"type": "stop", "matched": "NaN happened"})
    server.trouble = once("/generate", nan)
    with pytest.raises(ValueError, match="NaN happened"):
        run([server], lambda engine: engine.generate(PREFIXES[0], sampling()))


@pytest.mark.parametrize(("prompt", "max_tokens"), [((), 4), (PREFIXES[0], 0)])
def test_impossible_requests_are_not_sent(serve: Serve, prompt: tuple[int, ...], max_tokens: int) -> None:
    (server,) = serve()
    with pytest.raises(ValueError, match="at least"):
        run([server], lambda engine: engine.generate(prompt, sampling(max_tokens=max_tokens)))
    assert not server.generated()


# -- no silent hang ----------------------------------------------------------------------------------------------------


def test_a_stalled_server_is_left_after_the_time_limit(serve: Serve, caplog: Any) -> None:
    servers = serve(2)
    servers[0].trouble = lambda server, path, body: time.sleep(3) if path == "/generate" else None
    servers[1].delay_s = 0.01

    async def main(engine: SGLangEngine) -> None:
        started = time.monotonic()
        await asyncio.gather(*(engine.generate(PREFIXES[0], sampling(seed)) for seed in range(4)))
        assert 0.3 < time.monotonic() - started < 1.5

    run(servers, main, request_timeout_s=0.3)
    assert "no answer to /generate within 0.3 s" in caplog.text


def test_a_request_that_fails_everywhere_is_given_up(serve: Serve) -> None:
    (server,) = serve()
    server.trouble = lambda server, path, body: (500, "boom") if path == "/generate" else None
    with pytest.raises(RuntimeError, match=r"gave up on a request after 4 tries: (.*HTTP 500: boom.*){4}"):
        run([server], lambda engine: engine.generate(PREFIXES[0], sampling()))
    assert len(server.generated()) == 4


def test_a_server_that_stays_away_is_named_after_the_time_limit(serve: Serve) -> None:
    (server,) = serve()
    started = 0.0

    async def main(engine: SGLangEngine) -> None:
        nonlocal started
        server.stop()
        started = time.monotonic()
        await asyncio.gather(*(engine.generate(PREFIXES[0], sampling(seed)) for seed in range(3)))

    with pytest.raises(RuntimeError, match=rf"was not back within 0\.5 s; {server.url}: .*Error"):
        run([server], main, recovery_timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < 2


def test_requests_wait_for_the_only_server_to_come_back(serve: Serve) -> None:
    (server,) = serve()

    async def main(engine: SGLangEngine) -> list[Any]:
        await engine.warm(PREFIXES[0])
        server.stop()
        waiting = [asyncio.create_task(engine.generate(PREFIXES[0] + (9,), sampling(seed))) for seed in range(3)]
        await asyncio.sleep(0.2)
        assert not any(task.done() for task in waiting)
        server.start()
        return await asyncio.gather(*waiting)

    texts = run([server], main)
    # The prefix was warmed anew before the group, under weights that were sent anew.
    assert [text.cached_tokens for text in texts] == [8, 8, 8] or sum(text.cached_tokens for text in texts) > 24
    assert server.weights.keys() == WEIGHTS.keys()


def test_the_first_contact_fails_in_one_sentence(serve: Serve) -> None:
    (server,) = serve()
    server.stop()
    with pytest.raises(RuntimeError, match=rf"^{server.url}: /server_info failed with ConnectError"):
        run([server], lambda engine: engine.warm(PREFIXES[0]))


class Launched:
    """In place of a server's process: what `Fleet` asks of one of its own. Its HTTP side is as real as the others'."""

    def __init__(self, scripted: ScriptedServer, restartable: bool = True) -> None:
        self.url, self._scripted, self._restartable = scripted.url, scripted, restartable
        self.restarts = 0
        self.stopped = False

    async def wait_healthy(self, limit_s: float, report: Callable[[str], None]) -> None:
        if not self._restartable and self.restarts:
            raise RuntimeError("the SGLang server ended with exit code 1")

    def restart(self) -> None:
        self.restarts += 1
        self._scripted.stop()
        self._scripted.released = False
        self._scripted.start()

    def stop(self) -> None:
        self.stopped = True


def run_own(
    launched: list[Launched], call: Callable[[SGLangEngine], Awaitable[T]], tmp_path: Path, memory_saver: bool = False
) -> T:
    """As `run`, with servers of our own."""
    waiting = iter(launched)
    settings = ServerSettings(Path(sys.executable), tmp_path, "float32", "cpu", memory_saver=memory_saver)

    async def main() -> T:
        config = EngineConfig(kind="sglang", sync="tensor", request_timeout_s=5, recovery_timeout_s=5)
        engine = SGLangEngine([settings] * len(launched), config, tmp_path)
        try:
            async with asyncio.timeout(20):
                await engine.update_weights(WEIGHTS.items(), 0)
                return await call(engine)
        finally:
            await engine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sglang_fleet.SGLangServer, "launch", lambda settings, log: next(waiting))
        result = asyncio.run(main())
    assert all(process.stopped for process in launched)
    return result


def test_our_own_server_is_restarted_if_it_does_not_generate(serve: Serve, tmp_path: Path) -> None:
    (server,) = serve()
    launched = Launched(server)

    async def main(engine: SGLangEngine) -> None:
        server.trouble = once("/generate", (500, "a hiccup"))
        await engine.generate(PREFIXES[0], sampling())
        assert launched.restarts == 0  # it was fine
        server.stop()
        texts = await asyncio.gather(*(engine.generate(PREFIXES[0], sampling(seed)) for seed in range(4)))
        assert launched.restarts == 1 and [text.weight_version for text in texts] == [0] * 4
        assert server.weights.keys() == WEIGHTS.keys()

    run_own([launched], main, tmp_path)


def test_servers_on_the_trainers_gpu_lend_it_their_memory(serve: Serve, tmp_path: Path) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> None:
        await engine.warm(PREFIXES[0])
        await engine.release()
        assert all(server.released for server in servers)
        await engine.update_weights(WEIGHTS.items(), 1)
        assert not any(server.released for server in servers)
        assert all(server.weights.keys() == WEIGHTS.keys() for server in servers)
        assert (await engine.generate(PREFIXES[0], sampling())).weight_version == 1

        await engine.release()
        servers[1].trouble = once("/resume_memory_occupation", (500, "no memory"))
        await engine.update_weights(WEIGHTS.items(), 2)
        while servers[1].version != "2":
            await asyncio.sleep(0.01)
        assert not any(server.released for server in servers)

    launched = [Launched(server) for server in servers]
    run_own(launched, main, tmp_path, memory_saver=True)
    assert [process.restarts for process in launched] == [0, 1]


def test_other_servers_keep_their_memory(serve: Serve, tmp_path: Path) -> None:
    servers = serve(2)
    run(servers[:1], lambda engine: engine.release())
    run_own([Launched(servers[1])], lambda engine: engine.release(), tmp_path)
    assert not any(server.released for server in servers)


def test_our_own_server_that_does_not_start_again_is_lost_and_tried_again_later(
    serve: Serve, tmp_path: Path, caplog: Any
) -> None:
    one, two = serve(2)
    launched = [Launched(one, restartable=False), Launched(two)]

    async def main(engine: SGLangEngine) -> None:
        one.stop()
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(4)))
        while "did not come back: the SGLang server ended with exit code 1" not in caplog.text:
            await asyncio.sleep(0.01)
        launched[0]._restartable = True
        await engine.update_weights(WEIGHTS.items(), 1)
        while one.version != "1":
            await asyncio.sleep(0.01)
        await engine.update_weights(WEIGHTS.items(), 2)
        assert caplog.text.count("is down") == 2  # it is not lost any more
        two.stop()
        launched[1]._restartable = False
        await engine.generate((9,), sampling())
        while caplog.text.count("did not come back") < 2:
            await asyncio.sleep(0.01)
        one.stop()
        launched[0]._restartable = False
        await engine.generate((9,), sampling())

    with pytest.raises(RuntimeError, match=r"^no SGLang server is left: (.*did not come back: .* exit code 1.*){2}$"):
        run_own(launched, main, tmp_path)


def test_a_server_that_ignores_seeds_is_named(serve: Serve, caplog: Any) -> None:
    (server,) = serve()
    server.deterministic = False
    run([server], lambda engine: engine.warm(PREFIXES[0]))
    assert f"{server.url} ignores seeds: start it with --enable-deterministic-inference" in caplog.text


def test_nothing_is_generated_before_weights() -> None:
    engine = SGLangEngine(["http://127.0.0.1:1"], EngineConfig(), Path())

    async def main() -> None:
        async with asyncio.timeout(0.2):
            await engine.generate(PREFIXES[0], sampling())

    with pytest.raises(AssertionError, match="call update_weights first"):
        asyncio.run(main())


# -- prefixes ----------------------------------------------------------------------------------------------------------


def test_a_group_goes_where_its_prefix_is(serve: Serve) -> None:
    servers = serve(3)

    async def main(engine: SGLangEngine) -> list[list[Any]]:
        for prefix in PREFIXES:
            await engine.warm(prefix)
        return [
            await asyncio.gather(*(engine.generate((*prefix, 60 + i), sampling(i)) for i in range(4)))
            for prefix in PREFIXES
        ]

    groups = run(servers, main)
    assert all(text.cached_tokens == 8 for group in groups for text in group)
    homes = [{s.port for s in servers for c in s.generated() if c.body["input_ids"][:8] == list(p)} for p in PREFIXES]
    assert all(len(home) == 1 for home in homes)  # nobody strays
    assert sorted(len(s.generated()) for s in servers) == [10, 10, 10]  # two prefixes each


def test_a_prefix_is_warmed_once_however_many_ask(serve: Serve) -> None:
    (server,) = serve()
    server.delay_s = 0.05

    async def main(engine: SGLangEngine) -> None:
        await asyncio.gather(*(engine.warm(PREFIXES[0]) for _ in range(5)))
        await engine.warm(PREFIXES[0])

    run([server], main)
    assert len(server.generated()) == 1


def test_the_longest_warmed_prefix_counts(serve: Serve) -> None:
    servers = serve(2)
    short, long = PREFIXES[0][:3], PREFIXES[0]

    async def main(engine: SGLangEngine) -> None:
        await engine.warm(short)
        await engine.warm(long)
        for seed in range(3):
            await engine.generate((*long, 99), sampling(seed))

    run(servers, main)
    lengths = sorted([len(call.body["input_ids"]) for call in server.generated()] for server in servers)
    assert lengths == [[3], [8, 9, 9, 9]]


def test_prompts_without_a_prefix_go_to_the_server_with_the_fewest(serve: Serve) -> None:
    servers = serve(2)
    for server in servers:
        server.delay_s = 0.2

    async def main(engine: SGLangEngine) -> None:
        await engine.generate((9,), sampling())
        await engine.generate((9,), sampling())
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(6)))

    run(servers, main)
    assert [len(server.generated()) for server in servers] == [5, 3]  # one after the other, the first is always free


def test_a_group_whose_server_dies_is_warmed_elsewhere_first(serve: Serve) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> list[Any]:
        await engine.warm(PREFIXES[0])
        (home,) = [server for server in servers if server.generated()]
        home.stop()
        texts = await asyncio.gather(*(engine.generate((*PREFIXES[0], 50 + i), sampling(i)) for i in range(4)))
        return [home, texts]

    home, texts = run(servers, main)
    (other,) = [server for server in servers if server is not home]
    assert [len(call.body["input_ids"]) for call in other.generated()] == [8, 9, 9, 9, 9]
    assert [text.cached_tokens for text in texts] == [8] * 4


def test_cancelling_one_of_a_group_leaves_the_others_alone(serve: Serve) -> None:
    (server,) = serve()
    server.delay_s = 0.1

    async def main(engine: SGLangEngine) -> list[Any]:
        engine._prefixes[PREFIXES[0]] = 0
        tasks = [asyncio.create_task(engine.generate((*PREFIXES[0], 50 + i), sampling(i))) for i in range(3)]
        await asyncio.sleep(0.05)  # all wait for the prefix
        tasks[0].cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        await engine.update_weights(WEIGHTS.items(), 1)  # would wait for ever if the cancelled one still counted
        return done

    cancelled, *others = run([server], main)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [text.cached_tokens for text in others] == [8, 8]


def test_a_prefix_is_forgotten_when_a_version_has_passed_without_it(serve: Serve) -> None:
    (server,) = serve()

    async def main(engine: SGLangEngine) -> None:
        await engine.warm(PREFIXES[0])
        await engine.update_weights(WEIGHTS.items(), 1)
        await engine.generate((*PREFIXES[0], 1), sampling())
        await engine.update_weights(WEIGHTS.items(), 2)
        await engine.update_weights(WEIGHTS.items(), 3)
        await engine.generate((*PREFIXES[0], 1), sampling())

    run([server], main)
    assert [len(call.body["input_ids"]) for call in server.generated()] == [8, 8, 9, 9]


def test_tokens_are_counted_against_a_perfect_cache(serve: Serve) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> Any:
        await engine.warm(PREFIXES[0])
        await asyncio.gather(*(engine.generate((*PREFIXES[0], 50, 51, i), sampling(i)) for i in (1, 2)))
        before = engine.stats()
        # Held by the first of them: what a perfect cache would find. The scripted server finds it too ...
        await engine.generate((*PREFIXES[0], 50, 51, 1, 3), sampling())
        hit = engine.stats().since(before)
        for server in servers:
            server.cached.clear()  # ... until it forgets
        first = await engine.generate((*PREFIXES[0], 50, 51, 1, 4), sampling())
        missed = engine.stats().since(before).since(hit)
        await engine.generate((*PREFIXES[0], 50, 51, 1, 4, *first.ids, 9), sampling())  # what was said is held as well
        assert engine.stats().reusable_prompt_tokens - before.reusable_prompt_tokens == 11 + 11 + 15
        return before, hit, missed

    before, hit, missed = run(servers, main)
    assert (before.prompt_tokens, before.generated_tokens) == (8 + 11 + 11, 8)
    assert 16 <= before.cached_prompt_tokens == before.reusable_prompt_tokens <= 18
    assert (hit.prompt_tokens, hit.cached_prompt_tokens, hit.reusable_prompt_tokens) == (12, 11, 11)
    assert (missed.prompt_tokens, missed.cached_prompt_tokens, missed.reusable_prompt_tokens) == (12, 0, 11)


sequences = st.lists(st.integers(0, 2), max_size=8)


@given(held=st.lists(sequences, max_size=6), prompt=sequences.filter(bool))
def test_a_perfect_cache_finds_the_longest_prefix(held: list[list[int]], prompt: list[int]) -> None:
    cache = PerfectCache()
    for ids in held:
        cache.hold(ids)
    expected = max((n for n in range(len(prompt)) if any(ids[:n] == prompt[:n] for ids in held)), default=0)
    assert cache.reusable(prompt) == expected


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_weights_arrive_in_order_and_nothing_old_survives(serve: Serve, way: str, tmp_path: Path) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> Any:
        await engine.warm(PREFIXES[0])
        await engine.generate((77, 78), sampling())
        for server in servers:
            server.calls.clear()
        changed = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
        await engine.update_weights(changed.items(), 1)
        before = engine.stats()
        text = await engine.generate((77, 78), sampling())
        assert engine.stats().since(before).reusable_prompt_tokens == 0
        again = await engine.generate((*PREFIXES[0], 1), sampling())  # was in use, and is warmed anew
        assert again.cached_tokens == 8
        return text, changed

    text, changed = run(servers, main, sync=way, sync_folder=tmp_path / "weights")
    assert (text.weight_version, text.cached_tokens) == (1, 0)
    send = {"tensor": ["/update_weights_from_tensor"] * 2, "disk": ["/update_weights_from_disk"]}[way]
    session = ["/begin_weight_update", *send, "/end_weight_update"] if way == "tensor" else send
    for server in servers:
        assert server.paths()[: len(session) + 2] == [*session, "/flush_cache", "/update_weight_version"]
        assert server.weights.keys() == changed.keys()
        assert all(torch.equal(server.weights[name], changed[name]) for name in changed)
    calls = [call.body for server in servers for call in server.generated()]
    assert [call["extra_key"] for call in calls] == ["1"] * 3
    assert sorted(len(call["input_ids"]) for call in calls) == [2, 8, 9]
    assert not list((tmp_path / "weights").glob("*")) if way == "disk" else True


def test_a_text_never_sees_two_weights(serve: Serve) -> None:
    servers = serve(2)
    for server in servers:
        server.delay_s = 0.15  # the server asserts that nothing runs while weights change

    async def main(engine: SGLangEngine) -> list[int]:
        early = [asyncio.create_task(engine.generate((1, i), sampling(i))) for i in range(4)]
        await asyncio.sleep(0.05)
        update = asyncio.create_task(engine.update_weights(WEIGHTS.items(), 1))
        await asyncio.sleep(0.02)
        late = [asyncio.create_task(engine.generate((2, i), sampling(i))) for i in range(4)]
        await update
        return [text.weight_version for text in await asyncio.gather(*early, *late)]

    assert run(servers, main) == [0] * 4 + [1] * 4


def test_requests_wait_while_weights_travel(serve: Serve) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> list[int]:
        for server in servers:
            server.trouble = lambda server, path, body: time.sleep(0.2) if path == "/end_weight_update" else None
        update = asyncio.create_task(engine.update_weights(WEIGHTS.items(), 1))
        while not any("/end_weight_update" in server.paths()[-1:] for server in servers):
            await asyncio.sleep(0.01)
        texts = await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(4)))
        await update
        return [text.weight_version for text in texts]

    assert run(servers, main) == [1] * 4


STEPS = [
    "/begin_weight_update",
    "/update_weights_from_tensor",
    "/end_weight_update",
    "/flush_cache",
    "/update_weight_version",
]


@pytest.mark.parametrize(("step", "status"), [(step, 400) for step in STEPS] + [(step, 200) for step in STEPS[:3]])
def test_a_refused_step_is_named(serve: Serve, step: str, status: int) -> None:
    (server,) = serve()
    server.trouble = once(step, (status, {"success": False, "message": "not today"}))
    with pytest.raises(ValueError, match=rf"^{server.url} refused {step}.*: not today$"):
        run([server], lambda engine: engine.update_weights(WEIGHTS.items(), 1))


def test_a_session_left_open_is_taken_over(serve: Serve) -> None:
    (server,) = serve()
    server.session = True
    run([server], lambda engine: engine.generate(PREFIXES[0], sampling()))
    assert server.weights.keys() == WEIGHTS.keys()


def test_a_server_lost_in_the_proof_is_brought_back(serve: Serve) -> None:
    servers = serve(2)
    servers[0].trouble = once("/weights_checker", (0, ""))

    async def main(engine: SGLangEngine) -> None:
        while not all(server.version == "0" for server in servers):
            await asyncio.sleep(0.01)
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(4)))

    run(servers, main)
    assert all(torch.equal(server.weights["b"], WEIGHTS["b"]) for server in servers)


@pytest.mark.parametrize("step", STEPS)
def test_a_server_lost_while_weights_travel_is_brought_back_alone(serve: Serve, step: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    servers = serve(2)

    async def main(engine: SGLangEngine) -> None:
        servers[0].trouble = once(step, (0, ""))
        await engine.update_weights({name: tensor + 1 for name, tensor in WEIGHTS.items()}.items(), 1)
        while "is back" not in caplog.text:
            await asyncio.sleep(0.01)
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(4)))

    run(servers, main)
    for server in servers:
        assert server.version == "1"
        assert torch.equal(server.weights["b"], WEIGHTS["b"] + 1)
        assert [call.body["extra_key"] for call in server.generated()] == ["1", "1"]


def test_a_refusal_that_follows_from_another_servers_end_is_none(serve: Serve) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> None:
        servers[0].trouble = once("/update_weights_from_tensor", (0, ""))
        servers[1].trouble = once("/update_weights_from_tensor", (400, {"success": False, "message": "lost a peer"}))
        await engine.update_weights({name: tensor + 1 for name, tensor in WEIGHTS.items()}.items(), 1)
        await engine.generate((1,), sampling())

    run(servers, main)
    assert torch.equal(servers[1].weights["b"], WEIGHTS["b"] + 1)


def test_weights_sent_under_the_version_before_are_sent(serve: Serve) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> None:
        servers[0].trouble = once("/update_weights_from_tensor", (0, ""))
        await engine.update_weights({name: tensor + 1 for name, tensor in WEIGHTS.items()}.items(), 0)
        while not all(torch.equal(server.weights["b"], WEIGHTS["b"] + 1) for server in servers):
            await asyncio.sleep(0.01)

    run(servers, main)


def test_weights_that_change_while_a_server_comes_back_are_the_new_ones(serve: Serve, caplog: Any) -> None:
    servers = serve(2)

    async def main(engine: SGLangEngine) -> None:
        await engine.warm(PREFIXES[0])
        (home,) = [server for server in servers if server.generated()]
        home.stop()
        await engine.generate(PREFIXES[0], sampling())  # finds out, goes elsewhere
        await engine.update_weights({name: tensor + 1 for name, tensor in WEIGHTS.items()}.items(), 1)
        home.start()
        while home.version != "1":
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(4)))

    run(servers, main)
    assert caplog.text.count("is down") == 1
    for server in servers:
        assert torch.equal(server.weights["b"], WEIGHTS["b"] + 1)
        assert [call.body["extra_key"] for call in server.generated()][-2:] == ["1", "1"]


@pytest.mark.parametrize("when", ["before", "while"])
def test_half_changed_weights_are_not_served(serve: Serve, when: str) -> None:
    """As when the trainer learns while dialogues go on, and a server comes back meanwhile."""
    servers = serve(2)
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}

    def learn(server: ScriptedServer, path: str, body: Body) -> None:
        if path == ("/health_generate" if when == "before" else "/update_weights_from_tensor"):
            weights["b"] += 1

    async def main(engine: SGLangEngine) -> None:
        servers[0].trouble = learn
        servers[0].stop()
        servers[0].start()
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(3)))
        while servers[0].paths().count("/health_generate") < 4:
            await asyncio.sleep(0.01)
        assert servers[0].paths().count("/begin_weight_update") == (2 if when == "before" else 3)
        assert not [call for call in servers[0].generated() if call.ended > servers[0].calls[-4].started]
        servers[0].trouble = lambda server, path, body: None
        await engine.update_weights(weights.items(), 1)
        while servers[0].version != "1":
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        await asyncio.gather(*(engine.generate((k,), sampling()) for k in range(4)))

    run(servers, main, weights=weights)
    assert [call.body["extra_key"] for call in servers[0].generated()][-2:] == ["1", "1"]
    assert all(torch.equal(server.weights["b"], weights["b"]) for server in servers)


def test_a_request_that_waits_for_the_next_weights_does_not_hold_them_up(serve: Serve) -> None:
    """The only server dies after the trainer has changed its weights: only the next version brings it back."""
    (server,) = serve()
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}

    async def main(engine: SGLangEngine) -> Any:
        server.stop()
        weights["b"] += 1
        waiting = asyncio.create_task(engine.generate(PREFIXES[0], sampling()))
        await asyncio.sleep(0.2)
        server.start()
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await engine.update_weights(weights.items(), 1)
        return await waiting

    assert run([server], main, weights=weights).weight_version == 1
    assert torch.equal(server.weights["b"], weights["b"])


def test_a_server_that_forgets_a_tensor_is_found_out(serve: Serve) -> None:
    (server,) = serve()

    def forgetful(server: ScriptedServer, path: str, body: Body) -> Answer | None:
        if path == "/weights_checker" and body["action"] == "checksum":
            server.weights.setdefault("lm_head.weight", torch.ones(3))
        return None

    server.trouble = forgetful
    with pytest.raises(
        RuntimeError, match=rf"1 of the 4 tensors of {server.url} are not .* among them lm_head\.weight"
    ):
        run([server], lambda engine: engine.generate(PREFIXES[0], sampling()))


def test_the_proof_is_repeated(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_fleet, "PROVE_EVERY", 3)
    (server,) = serve()

    async def main(engine: SGLangEngine) -> None:
        for version in range(1, 7):
            await engine.update_weights(WEIGHTS.items(), version)

    run([server], main)
    assert server.paths().count("/weights_checker") == 3 * 3  # at versions 0, 3 and 6


def test_weights_are_sent_more_than_once() -> None:
    engine = SGLangEngine(["http://127.0.0.1:1"], EngineConfig(), Path())
    with pytest.raises(AssertionError, match="pass no iterator"):
        asyncio.run(engine.update_weights(iter(WEIGHTS.items()), 0))


def test_buckets_are_bounded_and_of_one_dtype() -> None:
    rng = random.Random(0)
    dtypes = [torch.float32, torch.bfloat16]
    weights = [(str(i), torch.zeros(rng.randint(1, 40), dtype=rng.choice(dtypes))) for i in range(60)]
    found = list(buckets(weights, 100))
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in weights]
    for bucket in found:
        assert len({tensor.dtype for _, tensor in bucket}) == 1
        assert len(bucket) == 1 or sum(tensor.nbytes for _, tensor in bucket) <= 100
    for one, two in itertools.pairwise(found):  # none is cut short
        joined = [*one, two[0]]
        assert len({t.dtype for _, t in joined}) == 2 or sum(t.nbytes for _, t in joined) > 100


def test_no_more_than_a_bucket_is_held(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors made one at a time, as from shards, are freed as they are sent."""
    monkeypatch.setitem(weight_sync.BUCKET_BYTES, "cpu", 4000)
    (server,) = serve()
    alive, most = [0], [0]

    class Made:
        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            for number in range(40):
                memory = np.zeros(250, dtype=np.float32)  # lives as long as whatever tensor shares it
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                weakref.finalize(memory, lambda: alive.__setitem__(0, alive[0] - 1))
                yield str(number), torch.from_numpy(memory)
                del memory

    async def main(engine: SGLangEngine) -> None:
        await engine.update_weights(Made(), 1)

    run([server], main)
    assert len(server.weights) == 40 + len(WEIGHTS)
    assert most[0] <= 6  # four to a bucket, the next one, and the one in hand


@pytest.mark.parametrize(
    ("wanted", "device", "same_gpu", "way", "why"),
    [
        ("auto", "cpu", True, "distributed", "gloo"),
        ("auto", "cuda", True, "tensor", "IPC"),
        ("auto", "cuda", False, "distributed", "NCCL"),
        ("disk", "cuda", True, "disk", "configured"),
        ("tensor", "cpu", False, "tensor", "configured"),
    ],
)
def test_choose_way(wanted: str, device: str, same_gpu: bool, way: str, why: str) -> None:
    chosen, reason = choose_way(wanted, torch.device(device), same_gpu)
    assert chosen == way and why in reason
