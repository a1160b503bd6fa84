"""The SGLang engine against the real server: SGLang 0.5.23 on the CPU, SmolLM2-135M in fp32.

It needs the environment that `make sglang` builds, and takes minutes: starting a server takes one. The server of all
tests but the last starts while the first of them runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
import torch
from helpers import SMOLLM2
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from negotiator import rollout
from negotiator.config import DialogueConfig, EngineConfig
from negotiator.data import draw_scenarios, load_dilemmas, load_personas
from negotiator.dialogue import Table
from negotiator.engines import weight_sync
from negotiator.engines.sglang import SGLangEngine
from negotiator.engines.sglang_server import ServerSettings, SGLangServer
from negotiator.engines.weight_sync import Link, Receiver, push
from negotiator.judges.plugin import PluginJudge
from negotiator.models import load_model
from negotiator.prompts.templates import Templates, stop_ids
from negotiator.types import Generation, SamplingParams

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
START_S = 600.0  # for a server to start on a busy machine

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(not PYTHON.exists(), reason="no SGLang here: `make sglang` builds its environment"),
]
T = TypeVar("T")


# -- the whole job -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangServer]:
    """The server of the tests below; nobody has waited for it yet."""
    settings = ServerSettings(PYTHON, SMOLLM2, "float32", "cpu", max_total_tokens=16384, max_running=32)
    server = SGLangServer.launch(settings, tmp_path_factory.mktemp("logs") / "sglang.log")
    yield server
    server.stop()


def test_a_run_completes_though_its_server_is_killed_in_mid_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own_server = {"engine.python": PYTHON, "engine.cache_tokens": 8192, "engine.recovery_timeout_s": START_S}
    command, environment = training(folder, {"steps": 2} | own_server)
    with (tmp_path / "printed").open("w") as printed:
        trainer = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: _count(folder / "metrics.jsonl", "\n") == 1, "the first step", trainer, tmp_path)
        texts = _count(folder / "sglang-0.log", "POST /generate")
        wait_for(lambda: _count(folder / "sglang-0.log", "POST /generate") > texts, "the second", trainer, tmp_path)
        seen = psutil.Process(trainer.pid).children(recursive=True)
        (scheduler,) = [process for process in seen if "scheduler" in process.name()]
        scheduler.send_signal(signal.SIGKILL)
        wait_for(lambda: trainer.poll() is not None, "the end", trainer, tmp_path)
    finally:
        trainer.kill()
    assert trainer.returncode == 0, (tmp_path / "printed").read_text()

    log = (folder / "log.txt").read_text()
    assert "weights reach 1 SGLang server(s) by way of distributed: gloo, from the CPU" in log
    assert re.search(r"is down; (.|\n)*restarting the SGLang server (.|\n)*the SGLang server \S+ is back", log)
    for step, row in enumerate(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())):
        assert row["failed_dialogues"] == 0 and row["grad_norm"] > 0
        assert 0 < row["logprob_gap"] < 1e-3  # what the server generated under is what the learner trains
        assert step == 1 or row["cached_fraction_of_ideal"] >= 0.95  # a restart forgets
        file = folder / "transcripts" / f"step-{step + 1:05d}.jsonl"
        utterances = [u for line in file.read_text().splitlines() for u in json.loads(line)["utterances"]]
        assert len(utterances) == 6 and {u["weight_version"] for u in utterances} == {step}
    deadline = time.monotonic() + 20
    while left := [process for process in seen if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.1)


def training(folder: Path, more: dict[str, object]) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a small run whose dialogues are scored differently, so that something is learned."""
    judge = folder.parent / "made_up_judge.py"
    judge.write_text("def score(scenario, dialogue): return sum(len(u.text) for u in dialogue.utterances) % 6")
    settings = {
        "runs": folder.parent,
        "name": folder.name,
        "model.path": SMOLLM2,
        "model.dtype": "fp32",
        "model.device": "cpu",
        "dialogue.max_rounds": 1,
        "dialogue.max_tokens": 12,
        "dialogue.completion_max_tokens": 12,
        "rollout.scenarios": 1,
        "rollout.group_size": 3,
        "engine.kind": "sglang",
        "judge.agreement": "negotiator.judges.rewards:after_a_round",
        "judge.reward": "made_up_judge:score",
        "optimizer.lr": "1.0e-4",
        "optimizer.micro_batch_tokens": 2048,  # the run has to fit beside the server
    }
    options = [word for key, value in (settings | more).items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "negotiator.train", *options]
    return command, os.environ | {"PYTHONPATH": str(folder.parent)}


def wait_for(condition: Any, what: str, trainer: subprocess.Popen[bytes], tmp_path: Path) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert trainer.poll() in (None, 0), (tmp_path / "printed").read_text()
        assert time.monotonic() < deadline, f"waited too long for {what}: {(tmp_path / 'printed').read_text()}"
        time.sleep(0.02)


def _count(file: Path, what: str) -> int:
    return file.read_text().count(what) if file.exists() else 0


# -- one engine, one server --------------------------------------------------------------------------------------------


@dataclass
class Live:
    """An engine whose server serves `model`, and the event loop it lives in."""

    loop: asyncio.AbstractEventLoop
    url: str
    engine: SGLangEngine
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    version: int = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 300))

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text))

    def push(self) -> None:
        """Gives the server the model's weights as they are."""
        self.version += 1
        self.run(self.engine.update_weights(dict(self.model.named_parameters()).items(), self.version))

    def generate_all(self, requests: list[tuple[tuple[int, ...], SamplingParams]]) -> list[Generation]:
        async def together() -> list[Generation]:
            return await asyncio.gather(*(self.engine.generate(prompt, sampling) for prompt, sampling in requests))

        return self.run(together())

    def greedy(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """What Hugging Face makes of a prompt."""
        ids, ones = torch.tensor([prompt]), torch.ones(1, len(prompt), dtype=torch.int64)
        with torch.no_grad():
            output = self.model.generate(ids, attention_mask=ones, max_new_tokens=8, do_sample=False)
        return tuple(output[0, len(prompt) :].tolist())

    def logits(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> torch.Tensor:
        """[len(ids), V]: those from which each of `ids` was drawn."""
        with torch.no_grad():
            return self.model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]


@pytest.fixture(scope="module")
def live(starting: SGLangServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    loop = asyncio.new_event_loop()
    loop.run_until_complete(starting.wait_healthy(START_S, print))
    config = EngineConfig(kind="sglang", recovery_timeout_s=120)
    engine = SGLangEngine([starting.url], config, tmp_path_factory.mktemp("none"))
    model = load_model(SMOLLM2, torch.device("cpu"), torch.float32)
    live = Live(loop, starting.url, engine, model, AutoTokenizer.from_pretrained(SMOLLM2))
    live.push()
    yield live
    loop.run_until_complete(engine.close())
    loop.close()


PROMPTS = ("The capital of France is", "def fib(n):\n    ", "Two neighbours share one well in a dry summer. They")


def test_logprobs_are_of_the_scaled_softmax_over_the_whole_vocabulary(live: Live) -> None:
    requests = [
        (live.encode(prompt), SamplingParams(12, temperature=0.7, top_p=0.5, seed=seed))
        for seed, prompt in enumerate(PROMPTS)
    ]
    gaps: dict[str, list[torch.Tensor]] = {"scaled": [], "raw": [], "renormalised": []}
    for (prompt, _), generation in zip(requests, live.generate_all(requests), strict=True):
        logits = live.logits(prompt, generation.ids)
        scaled = (logits / 0.7).log_softmax(-1)
        ordered, order = scaled.exp().sort(descending=True)
        kept = ordered.cumsum(-1) - ordered <= 0.5  # the nucleus: what is more probable holds less than top-p
        mass = (ordered * kept).sum(-1, keepdim=True)
        renormalised = scaled - mass.log()
        for name, definition in (("scaled", scaled), ("raw", logits.log_softmax(-1)), ("renormalised", renormalised)):
            expected = definition.gather(1, torch.tensor(generation.ids)[:, None])[:, 0]
            gaps[name].append((torch.tensor(generation.logprobs) - expected).abs())
        in_nucleus = kept.gather(1, (order == torch.tensor(generation.ids)[:, None]).int().argmax(-1, keepdim=True))
        assert in_nucleus.all()
    assert torch.cat(gaps["scaled"]).max() < 1e-3
    assert torch.cat(gaps["raw"]).mean() > 0.05
    assert torch.cat(gaps["renormalised"]).mean() > 0.05


def test_next_logprobs_are_of_temperature_1(live: Live) -> None:
    prompt, asked = live.encode(PROMPTS[0]), [5, 7042, 0, 5]
    found = live.run(live.engine.next_logprobs(prompt, asked))
    expected = live.logits(prompt, (0,))[0].log_softmax(-1)[asked]
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-3, rtol=0)


def test_a_group_differs_and_its_seeds_repeat_it(live: Live) -> None:
    prompt = live.encode(PROMPTS[2])
    group = [(prompt, SamplingParams(10, temperature=0.7, top_p=0.95, seed=2**40 + seed)) for seed in range(6)]
    texts = live.generate_all(group)
    assert len({text.ids for text in texts}) == 6
    repeated = live.generate_all(group[::-1])[::-1]
    assert [text.ids for text in repeated] == [text.ids for text in texts]
    (alone,) = live.generate_all(group[2:3])
    assert alone.ids == texts[2].ids


def test_stop_tokens_end_a_text_and_stay(live: Live) -> None:
    prompt = live.encode(PROMPTS[0])
    (free,) = live.generate_all([(prompt, SamplingParams(8, temperature=0))])
    stop = free.ids[4]
    length = free.ids.index(stop) + 1
    (stopped,) = live.generate_all([(prompt, SamplingParams(8, temperature=0, stop_ids=(stop,)))])
    assert (stopped.ids, stopped.finish_reason) == (free.ids[:length], "stop")
    # The model's own end of a turn, which SGLang would stop at, does not end a text that nothing is to end.
    turn = live.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)[
        "input_ids"
    ]
    (long,) = live.generate_all([(tuple(turn), SamplingParams(40, temperature=0))])
    assert len(long.ids) == 40 and live.tokenizer.eos_token_id in long.ids


def test_requests_that_cannot_fit_are_refused_in_one_sentence(live: Live) -> None:
    with pytest.raises(ValueError, match=r"refused /generate with HTTP 400: .*context length"):
        live.generate_all([((5,) * 9000, SamplingParams(4))])


def test_a_warmed_prefix_is_shared_by_all(live: Live) -> None:
    live.push()
    prefix = live.encode("Two neighbours share one well in a dry summer, and each has a reason to draw first. " * 5)
    before = live.engine.stats()
    live.run(live.engine.warm(prefix))
    texts = live.generate_all([((*prefix, 20 + k), SamplingParams(2, seed=k)) for k in range(6)])
    assert [text.cached_tokens for text in texts] == [len(prefix)] * 6
    did = live.engine.stats().since(before)
    assert did.prompt_tokens == len(prefix) + 6 * (len(prefix) + 1)
    assert did.cached_prompt_tokens == did.reusable_prompt_tokens == 6 * len(prefix)


def test_negotiates(live: Live) -> None:
    live.push()
    templates = Templates(live.tokenizer)
    judge = PluginJudge("negotiator.judges.rewards:asks_a_question", 0.5)
    table = Table(
        engine=live.engine,
        tokenizer=live.tokenizer,
        templates=templates,
        stop_ids=stop_ids(live.tokenizer, live.model.generation_config.eos_token_id),
        agreement=PluginJudge("negotiator.judges.rewards:after_a_round", 0.5),
        reward=judge,
        config=DialogueConfig(max_rounds=1, max_tokens=8, completion_max_tokens=4),
        seed=0,
    )
    scenarios = draw_scenarios(load_dilemmas(None), load_personas(None), seed=0, step=0, count=2)
    before = live.engine.stats()
    groups = live.run(rollout.run(table, 0, scenarios, 3))
    did = live.engine.stats().since(before)
    for group in groups:
        assert [dialogue.state for dialogue in group.dialogues] == ["scored"] * 3
        assert len({dialogue.utterances[0].generation.ids for dialogue in group.dialogues}) == 3
        for utterance in itertools.chain.from_iterable(dialogue.utterances for dialogue in group.dialogues):
            assert utterance.generation.weight_version == live.version
            assert utterance.generation.cached_tokens >= utterance.prefix_len
    assert did.cached_fraction_of_ideal is not None and did.cached_fraction_of_ideal >= 0.95


# -- weights -----------------------------------------------------------------------------------------------------------


def checksums_of(model: PreTrainedModel) -> dict[str, str]:
    """What SGLang computes of its tensors on a CPU; it keeps projections of the same input in one tensor."""
    fused = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
    fused |= {"up_proj": "gate_up_proj"}
    hashes: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        ours = re.compile("|".join(fused)).sub(lambda match: fused[match[0]], name)
        hashes.setdefault(ours, hashlib.sha256()).update(parameter.detach().numpy().tobytes())
    return {name: digest.hexdigest()[:16] for name, digest in hashes.items()}


def checksums_at(url: str) -> dict[str, str]:
    answer = httpx.post(f"{url}/weights_checker", json={"action": "checksum"}, timeout=60, trust_env=False).json()
    result: dict[str, str] = answer["ranks"][0]["checksums"]
    return result


def change(model: PreTrainedModel, seed: int) -> None:
    """Moves every weight far enough to change what the model says, and not so far that it babbles."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)


def test_changed_weights_arrive_and_are_obeyed(live: Live) -> None:
    prompts = [live.encode(prompt) for prompt in PROMPTS]
    greedy = [(prompt, SamplingParams(8, temperature=0)) for prompt in prompts]
    before = [text.ids for text in live.generate_all(greedy)]
    assert before == [live.greedy(prompt) for prompt in prompts]
    change(live.model, 1)
    live.push()
    texts = live.generate_all(greedy)
    after = [text.ids for text in texts]
    assert after == [live.greedy(prompt) for prompt in prompts]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert [text.cached_tokens for text in texts] == [0, 0, 0] and {t.weight_version for t in texts} == {live.version}
    assert checksums_at(live.url) == checksums_of(live.model)


def test_every_way_carries_every_byte(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for `tensor`, which is slow from a CPU and gets the small ones: the request is the same for a GPU's."""
    monkeypatch.setitem(weight_sync.BUCKET_BYTES, "cpu", 2**25)
    receiver = [Receiver(live.url, 1)]

    def link(way: weight_sync.Way) -> Link:
        return Link(live.engine._client, way, torch.device("cpu"), tmp_path, 60)

    for way in ("distributed", "disk"):
        change(live.model, 2)
        live.run(push(link(way), receiver, dict(live.model.named_parameters()).items(), 1000))
        assert checksums_at(live.url) == checksums_of(live.model)
    assert not list(tmp_path.iterdir())
    change(live.model, 3)
    small = {name: weight for name, weight in live.model.named_parameters() if weight.numel() < 2**18}
    live.run(push(link("tensor"), receiver, small.items(), 1000))
    there, ours = checksums_at(live.url), checksums_of(live.model)
    equal = {name for name in there if there[name] == ours[name]}
    assert {name for name in small if "_proj" not in name} <= equal and len(equal) < len(there)
    live.push()


def test_names_that_the_server_does_not_know_are_found_out(live: Live) -> None:
    """SGLang skips them without a word."""
    weights = {name.replace("layers.7.mlp", "layers.7.mlp.base"): w for name, w in live.model.named_parameters()}
    engine = SGLangEngine([live.url], EngineConfig(kind="sglang"), Path())

    async def main() -> None:
        try:
            await engine.update_weights(weights.items(), 1)
        finally:
            await engine.close()

    with pytest.raises(RuntimeError, match=r"2 of the \d+ tensors .* among them model\.layers\.7\.mlp\.down_proj\."):
        live.run(main())
    live.push()


ROUTER = """
import sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
Router.from_args(RouterArgs(host="127.0.0.1", port=int(sys.argv[1]), worker_urls=sys.argv[2:])).start()
"""  # its own command imports sglang, which takes seconds, and some stubs on a CPU


@pytest.fixture
def router(live: Live, tmp_path: Path) -> Iterator[str]:
    """SGLang's own router in front of the server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with (tmp_path / "router.log").open("w") as log:
        process = subprocess.Popen([PYTHON, "-c", ROUTER, str(port), live.url], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not _lists_a_worker(f"http://127.0.0.1:{port}"):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "router.log").read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _lists_a_worker(router: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return bool(httpx.get(f"{router}/workers", trust_env=False).json()["workers"])
    return False


def test_a_run_behind_a_router_negotiates_while_it_learns(live: Live, router: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    urls = [router, live.url.replace("127.0.0.1", "localhost")]  # the same server twice
    command, environment = training(folder, {"steps": 3, "rollout.ahead": True, "engine.urls": f"[{', '.join(urls)}]"})
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=START_S)
    assert f"text from SGLang at {live.url}; " in (folder / "log.txt").read_text()
    versions = []
    for step, row in enumerate(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())):
        assert row["failed_dialogues"] == 0 and row["grad_norm"] > 0
        file = folder / "transcripts" / f"step-{step + 1:05d}.jsonl"
        utterances = [u for line in file.read_text().splitlines() for u in json.loads(line)["utterances"]]
        versions.append({u["weight_version"] for u in utterances})
    assert versions[0] == {0}
    assert 0 in versions[1] <= {0, 1} and 1 in versions[2] <= {1, 2}  # begun before the step before it had learned
    live.push()
