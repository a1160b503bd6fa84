"""The evaluation: its statistics against closed forms, and the real command on a tiny model.

The local judge is real, the judges of comparisons are what each test says.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from misbehaving_endpoint import MisbehavingEndpoint, Received, says
from transformers import AutoModelForCausalLM

from negotiator.config import Config, DialogueConfig, LoRAConfig
from negotiator.evaluate import transcripts
from negotiator.evaluate.__main__ import main
from negotiator.evaluate.compare import Pair, in_both_orders
from negotiator.evaluate.general import TINY, figures
from negotiator.evaluate.play import dialogue_config, load_items, require_room
from negotiator.evaluate.policies import find_policy, fingerprint, load_policy
from negotiator.evaluate.records import Comparison, Journal, Text
from negotiator.evaluate.statistics import estimate, paired_difference, wilson
from negotiator.evaluate.summary import summarize, win_rate
from negotiator.judges import PairVerdict
from negotiator.lora import MergedTensors, load_adapted, save_adapter
from negotiator.models import load_model, load_tokenizer

CPU = torch.device("cpu")
ITEMS = 2


def binomial(count: int, share: float) -> list[float]:
    return [math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(count + 1)]


# --- statistics ---


def test_the_bootstrap_of_a_share_is_its_binomial_distribution():
    """Means of resamples of k ones in n are Binomial(n, k/n) / n, whose quantiles are exact."""
    for ones, count in ((4, 40), (21, 25), (5, 9), (54, 60)):
        found = estimate([1.0] * ones + [0.0] * (count - ones), seed=0)
        below = list(itertools.accumulate(binomial(count, ones / count)))
        low, high = (next(k for k, p in enumerate(below) if p >= q) / count for q in (0.025, 0.975))
        assert (found.mean, found.count) == (ones / count, count)
        assert found.low == pytest.approx(low) and found.high == pytest.approx(high)


def test_the_bootstrap_interval_covers_the_true_mean():
    random = np.random.default_rng(0)
    found = [estimate(random.normal(1.0, 2.0, 40).tolist(), seed) for seed in range(100)]
    covered = sum(e.low <= 1.0 <= e.high for e in found if e.low is not None and e.high is not None)
    assert 90 <= covered <= 98


def test_wilsons_interval_solves_its_equation_and_covers():
    for wins, count in ((0, 5), (5, 5), (7, 30), (57, 100)):
        low, high = wilson(wins, count)
        for end in (low, high):
            if 0 < end < 1:
                assert abs(wins / count - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count))
        assert low <= wins / count <= high
    inside = [(low <= 0.3 <= high) * p for k, p in enumerate(binomial(30, 0.3)) for low, high in [wilson(k, 30)]]
    assert 0.92 <= sum(inside) <= 0.98
    assert wilson(0, 0) is None


def test_differences_are_paired_and_reproducible():
    first = {f"i{n}": n + 2.0 for n in range(20)}
    second = {f"i{n}": float(n) for n in range(5, 30)}
    found = paired_difference(first, second, seed=1)
    assert (found.mean, found.low, found.high, found.count) == (2.0, 2.0, 2.0, 15)  # unpaired it would be wide
    values = [math.sqrt(n) for n in range(30)]
    assert estimate(values, 1) == estimate(values, 1) != estimate(values, 2)
    assert estimate([], 1).mean is None


# --- comparing ---


class Judge:
    """Says "first", "second" or "tie" by a function of the two texts; None: it fails."""

    def __init__(self, says) -> None:
        self.says = says

    async def compare(self, question: str, first: str, second: str, criterion: str) -> PairVerdict:
        said = self.says(first, second)
        return PairVerdict("tie", "no answer") if said is None else PairVerdict(said)

    async def close(self) -> None: ...


@pytest.mark.parametrize(
    ("says", "outcome"),
    [
        (lambda one, two: "first" if len(one) > len(two) else "second", "B"),
        (lambda one, two: "first" if len(one) < len(two) else "second", "A"),
        (lambda one, two: "first", "inconsistent"),
        (lambda one, two: "first" if one == "short" else "tie", "inconsistent"),
        (lambda one, two: "tie", "tie"),
        (lambda one, two: "first" if one == "short" else None, "failed"),
        (lambda one, two: None if one == "short" else "second", "failed"),
    ],
)
def test_only_what_both_orders_say_counts(says, outcome):
    pair = Pair("greedy", "open", "i", "collective_agency", "q", "short", "a longer one")
    assert asyncio.run(in_both_orders(pair, Judge(says))).outcome == outcome


def test_identical_texts_are_tied_and_nobody_is_asked():
    pair = Pair("greedy", "open", "i", "collective_agency", "q", "same", "same")
    found = asyncio.run(in_both_orders(pair, Judge(lambda *_: pytest.fail("asked"))))
    assert (found.outcome, found.identical) == ("tie", True)


def test_a_win_rate_counts_every_pair_once():
    said = {"A": ("A", "A"), "B": ("B", "B"), "tie": ("tie", "tie"), "inconsistent": ("A", "B"), "failed": ("A", "A")}
    outcomes = ["A"] * 6 + ["B"] * 2 + ["tie"] * 3 + ["inconsistent"] * 4 + ["failed"]
    about = ("greedy", "open", "collective_agency")
    found = [
        Comparison("greedy", "open", f"{n:02}", "collective_agency", *said[o], False, "no" if o == "failed" else None)
        for n, o in enumerate(outcomes)
    ]
    rate = win_rate(found, about, pairs=20, seed=0)
    assert (rate.a_wins, rate.b_wins, rate.tied, rate.inconsistent, rate.failed) == (6, 2, 3, 4, 5)
    assert (rate.pairs, rate.win_rate.mean, rate.win_rate.count) == (20, 0.75, 8)
    assert rate.wilson == wilson(6, 8)
    assert win_rate(found[::-1], about, pairs=20, seed=0) == rate  # whoever finished first


# --- the command ---


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory) -> Path:
    """Perturbed."""
    folder = tmp_path_factory.mktemp("other") / "other"
    model = load_model(tiny_model, CPU, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    load_tokenizer(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(config_file, tiny_model, other_model) -> list[str]:
    return ["--policy", str(other_model), "--against", str(tiny_model), "--config", str(config_file)]


@pytest.fixture(scope="module")
def done(arguments, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluation")
    assert main([*arguments, "--out", str(out), "--items", str(ITEMS)]) == 0
    return out


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_an_evaluation_leaves_what_it_promises(done):
    texts = lines(done, "texts.jsonl")
    keys = [(t["policy"], t["mode"], t["set"], t["item"]) for t in texts]
    items = load_items(ITEMS)
    names = [("conflict", s.dilemma.id) for s in items.conflict] + [("open", s.dilemma.id) for s in items.open]
    assert Counter(keys) == Counter((p, m, *n) for p in "AB" for m in ("greedy", "sampled") for n in names)
    assert all(t["completion"] for t in texts)  # also without agreement
    conflicts = [t for t in texts if t["set"] == "conflict"]
    assert not all(t["agreed"] for t in conflicts)
    assert all(len(t["utterances"]) == 2 * t["rounds"] for t in conflicts)
    assert all(0 <= t["score"] <= 5 for t in texts)

    results = json.loads((done / "results.json").read_text())
    for rate in results["win_rates"]:
        about = {name: rate[name] for name in ("mode", "set", "criterion")}
        pairs = [c for c in lines(done, "comparisons.jsonl") if about.items() <= c.items()]
        both = [c["a_first"] for c in pairs if c["a_first"] == c["b_first"]]
        assert len(pairs) == ITEMS
        assert (rate["a_wins"], rate["b_wins"]) == (both.count("A"), both.count("B"))
        assert rate["inconsistent"] == ITEMS - len(both)
    by_name = {(m["mode"], m["name"]): m for m in results["measures"]}
    of_a = [t for t in conflicts if (t["policy"], t["mode"]) == ("A", "sampled")]
    expected = 100 * sum(t["agreed"] for t in of_a) / ITEMS
    assert by_name["sampled", "agreement rate, %"]["a"]["mean"] == pytest.approx(expected)
    expected = sum(len(t["completion"].split()) for t in of_a) / ITEMS
    assert by_name["sampled", "words in the solution"]["a"]["mean"] == pytest.approx(expected)

    page = (done / "report.md").read_text()
    assert "not held out" in page and f"negotiates {ITEMS} conflicts" in page
    rows = lines(done, "transcripts.jsonl")
    assert len(rows) == 2 * 2 * ITEMS and all(row["A"] and row["B"] for row in rows)


def test_a_policy_against_itself_wins_nothing_and_greedy_texts_depend_on_no_seed(
    tiny_model, config_file, done, tmp_path
):
    same = ["--policy", str(tiny_model), "--against", str(tiny_model), "--config", str(config_file)]
    assert main([*same, "--out", str(tmp_path), "--items", "1", "--seed", "5"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for rate in results["win_rates"]:
        assert (rate["a_wins"], rate["b_wins"], rate["identical"], rate["win_rate"]["mean"]) == (0, 0, 1, None)
    for measure in results["measures"]:
        assert measure["difference"]["high"] in (0, None)

    before = {tuple(t.values())[:4]: t["completion"] for t in lines(done, "texts.jsonl")}
    for text in lines(tmp_path, "texts.jsonl"):
        same_text = text["completion"] == before["B", text["mode"], text["set"], text["item"]]
        assert same_text == (text["mode"] == "greedy")


def test_the_modes_are_what_they_are_called():
    config = DialogueConfig(max_tokens=5, completion_max_tokens=9)
    greedy, sampled = (dialogue_config(config, mode, "conflict") for mode in ("greedy", "sampled"))
    assert (greedy.temperature, greedy.completion_temperature) == (0, 0)
    assert sampled == config
    assert (dialogue_config(config, "sampled", "open").max_tokens, greedy.max_tokens) == (9, 5)


# --- going on ---


def test_a_rerun_does_only_what_is_missing_or_failed_and_gives_the_same(arguments, done, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    texts, comparisons = (lines(done, name) for name in ("texts.jsonl", "comparisons.jsonl"))
    failed = {**texts[0], "failure": "reward judge: no answer", "score": None}
    kept = (done / "texts.jsonl").read_bytes().splitlines(keepends=True)[:5]
    # As a kill in mid-write leaves it.
    (out / "texts.jsonl").write_bytes(b"".join([*kept, json.dumps(failed).encode() + b"\n", b'{"policy": "A", "mo']))
    uncompared = {**comparisons[0], "failure": "no answer"}
    (out / "comparisons.jsonl").write_bytes(json.dumps(uncompared).encode() + b"\n{")

    command = [*arguments, "--out", str(out), "--items", str(ITEMS)]
    assert main(command) == 0
    assert f"{4 * ITEMS - 5 + 1} to do" in capsys.readouterr().out
    assert lines(out, "texts.jsonl")[:6] == [*texts[:5], failed]
    now = {json.dumps(text) for text in lines(out, "texts.jsonl")[6:]}
    assert now == {json.dumps(text) for text in [texts[0], *texts[5:]]}
    assert Counter(map(json.dumps, lines(out, "comparisons.jsonl"))) == Counter(
        map(json.dumps, [uncompared, *comparisons])
    )
    results = [json.loads((folder / "results.json").read_text()) for folder in (out, done)]
    for name in ("win_rates", "measures", "failed"):
        assert results[0][name] == results[1][name]

    # How an endpoint is reached decides nothing, so it may change.
    assert main([*command, "--judge.timeout_s", "7"]) == 0
    assert "to do" not in capsys.readouterr().out


def test_ctrl_c_loses_nothing(arguments, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"

    def interrupt() -> None:
        while not texts.exists() or texts.read_bytes().count(b"\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    try:
        assert main([*arguments, "--out", str(tmp_path), "--items", "100", "--engine.max_running", "4"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert f"the same command goes on, with what is in {tmp_path}" in capsys.readouterr().err
    assert 3 <= len(Journal(texts, Text).records) == len(lines(tmp_path, "texts.jsonl")) < 200


def test_what_a_judge_failed_on_and_other_items_count_nowhere():
    items = load_items(2)
    ids = [scenario.dilemma.id for scenario in items.conflict]

    def text(side: str, item: str, rounds: int) -> Text:
        return Text(side, "greedy", "conflict", item, True, None, rounds, ["a b", "a b c d"], "a b c", 3.0)

    good = [text(side, item, n) for side in "AB" for n, item in enumerate(ids, start=1)] + [text("A", "other", 9)]
    bad = Text("A", "greedy", "conflict", ids[1], False, "reward judge: no answer", 7, ["a"], "a", None)
    texts = {text.key: text for text in [*good, bad]}
    summary = summarize(items, [*texts.values()], [], [], seed=0)
    found = {m.name: m for m in summary.measures if m.mode == "greedy"}
    rounds = found["rounds to agreement"]
    assert (rounds.a.mean, rounds.a.count, rounds.b.mean, rounds.b.count) == (1, 1, 1.5, 2)
    assert (rounds.difference.mean, rounds.difference.count) == (0, 1)
    assert (found["agreement rate, %"].a.mean, found["words in an utterance"].a.mean) == (100, 3)
    assert summary.failed == {"A": {"greedy": 1, "sampled": 0}, "B": {"greedy": 0, "sampled": 0}}
    assert all(rate.failed == rate.pairs == 2 for rate in summary.win_rates)


def test_an_endpoint_compares_and_its_recorded_verdicts_do_too(arguments, done, tmp_path, monkeypatch):
    def prefers_the_longer(_: int, request: Received):
        code = re.search(r'"code": "(\w+)"', request.body["messages"][0]["content"])
        a, b = re.search(
            r"<<<answer A \w+>>>\n(.*)\n<<<end.*<<<answer B \w+>>>\n(.*)\n<<<end", request.user, re.S
        ).groups()
        assert code
        return says(json.dumps({"code": code[1], "winner": "A" if len(a) > len(b) else "B"}))

    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    endpoint = MisbehavingEndpoint(prefers_the_longer)
    judge = ["--judge.evaluation", "openai", "--judge.url", endpoint.url, "--judge.name", "m"]
    out = tmp_path / "out"
    command = [*arguments, *judge, "--out", str(out), "--items", "1"]
    try:
        assert main(command) == 0
    finally:
        endpoint.close()
    texts = {tuple(t.values())[:4]: t["completion"] for t in lines(out, "texts.jsonl")}
    for said in lines(out, "comparisons.jsonl"):
        a, b = (len(texts[side, said["mode"], said["set"], said["item"]]) for side in "AB")
        if a != b:
            assert said["a_first"] == said["b_first"] == ("A" if a > b else "B")
    assert "not held out" not in (out / "report.md").read_text()

    before = sorted(map(json.dumps, lines(out, "comparisons.jsonl")))
    recorded = (out / "judge.sqlite").rename(tmp_path / "recorded.sqlite")
    (out / "comparisons.jsonl").unlink()
    assert main([*command, "--judge.cache", str(recorded), "--judge.replay", "true"]) == 0
    assert sorted(map(json.dumps, lines(out, "comparisons.jsonl"))) == before


# --- mistakes ---


def test_mistakes_are_answered_in_one_sentence(arguments, done, tiny_model, tmp_path, capsys):
    def error(*changed: str) -> str:
        try:
            code = main([*arguments, "--out", str(done), "--items", str(ITEMS), *changed])
        except SystemExit as exit:
            code = exit.code
        said = capsys.readouterr().err
        assert code == 2 and said.count("\n") == 1, said
        return said

    assert "another dialogue.max_tokens" in error("--dialogue.max_tokens", "13")
    assert "another policies.A" in error("--policy", str(tiny_model))
    assert "no model at" in error("--policy", str(tmp_path))
    assert "--items" in error("--items", "0")
    assert "raise engine.cache_tokens" in error("--engine.cache_tokens", "200")
    assert "lower dialogue.max_rounds" in error("--dialogue.max_rounds", "90")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no whole checkpoint" in error("--policy", str(tmp_path / "run"))
    if importlib.util.find_spec("lm_eval") is None:
        assert "pip install 'negotiator[general]'" in error("--general", "ifeval")


def test_a_line_that_is_no_record_is_named(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match=r"texts.jsonl:1 is no record"):
        Journal(tmp_path / "texts.jsonl", Text)


# --- policies ---


def test_a_run_means_its_newest_checkpoint(tiny_model, tmp_path):
    for step in ("step-2", "step-10"):
        shutil.copytree(tiny_model, tmp_path / "mine" / "checkpoints" / step)
    found = find_policy(tmp_path / "mine", "A")
    assert (found.folder.name, found.label) == ("step-10", "mine-step-10")
    assert find_policy(found.folder, "B").label == "mine-step-10"


def test_adapters_are_added_to_their_base(tiny_model, tmp_path):
    pytest.importorskip("peft")
    adapted = load_adapted(tiny_model, CPU, torch.float32, LoRAConfig(rank=4))
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    save_adapter(adapted, tmp_path)
    load_tokenizer(tiny_model).save_pretrained(tmp_path)  # as a checkpoint of the trainer has it
    policy = find_policy(tmp_path, "A")
    require_room(policy, load_items(1), Config(dialogue=DialogueConfig(max_rounds=2)))
    loaded = dict(load_policy(policy, CPU, torch.float32).named_parameters())
    expected = dict(MergedTensors(adapted))
    assert loaded.keys() == expected.keys()
    assert all(torch.allclose(loaded[name], tensor, atol=1e-6) for name, tensor in expected.items())
    base = dict(load_model(tiny_model, CPU, torch.float32).named_parameters())
    assert sum(not torch.equal(loaded[name], base[name]) for name in base) == 14


def test_other_weights_have_another_fingerprint(tiny_model, other_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "copy")
    same, copy, other = (fingerprint(find_policy(p, "A")) for p in (tiny_model, tmp_path / "copy", other_model))
    assert same == copy != other


# --- transcripts ---


def test_nothing_in_a_text_becomes_part_of_the_page():
    evil = "<script>alert(1)</script> <img src=x onerror=y> & \"q\" 'a' \ud800 \u2028 </p></section>"
    item = load_items(1).conflict[0].dilemma.id
    texts = [
        Text(side, mode, "conflict", item, True, evil if side == "B" else None, 1, [evil, evil], evil, 1.0)
        for side in ("A", "B")
        for mode in ("greedy", "sampled")
    ]
    found = [*transcripts.rows(load_items(1), {text.key: text for text in texts}, {})]
    plain = transcripts.as_html([*transcripts.rows(load_items(1), {}, {})], {"A": "a", "B": "b"})
    page = transcripts.as_html(found, {"A": "<b>x</b>", "B": evil})

    class Reader(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: Counter[str] = Counter()
            self.text = ""

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags[tag] += 1
            assert not any(name.startswith("on") or name == "src" for name, _ in attrs)

        def handle_data(self, data: str) -> None:
            self.text += data

    reader, expected = Reader(), Reader()
    reader.feed(page)
    expected.feed(plain)
    assert not {"script", "img"} & reader.tags.keys()
    assert reader.tags["section"] == expected.tags["section"]
    assert reader.text.count(evil) == 2 * (1 + 3 + 3 + 1 + 1)  # in each mode: label, both sides' texts, failure, label
    assert [json.loads(line) for line in transcripts.as_jsonl(found).split("\n")[:-1]] == found


# --- general abilities ---


def test_the_harness_figures_are_named_by_metric_and_filter():
    one = {"t": {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "em_stderr,strict": "N/A"}}
    assert figures(one) == {"acc": 0.5, "acc_stderr": 0.1, "em strict": 1.0}
    assert figures({"x": {"acc,none": 0.25}, "y": {"acc,none": 1.0}}) == {"x acc": 0.25, "y acc": 1.0}


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (negotiator[general])"
)
def test_the_harness_scores_both_policies_like_an_independent_computation(arguments, done, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(done, out)
    command = [*arguments, "--out", str(out), "--general", "tiny_task", "--items", str(ITEMS)]
    assert main(command) == 0
    for side, path in (("A", arguments[1]), ("B", arguments[3])):
        (found,) = [a for a in lines(out, "general.jsonl") if a["policy"] == side]
        assert found["items"] == ITEMS
        assert found["metrics"]["acc"] == pytest.approx(_accuracy(Path(path)))
    assert "| tiny_task | acc |" in (out / "report.md").read_text()
    assert main(command) == 0
    assert len(lines(out, "general.jsonl")) == 2  # nothing was done twice


def _accuracy(path: Path) -> float:
    """Of the choices the likelier after the question, put through the chat template."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), load_tokenizer(path)
    right = 0
    for line in (TINY / "tiny_task.jsonl").read_text().splitlines()[:ITEMS]:
        row = json.loads(line)
        asked = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        scores = []
        for choice in row["choices"]:
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            answer = tokenizer.encode(prompt + choice, add_special_tokens=False)[len(ids) :]
            with torch.no_grad():
                logprobs = torch.log_softmax(model(torch.tensor([ids + answer])).logits[0], -1)
            scores.append(sum(logprobs[len(ids) - 1 + i, token].item() for i, token in enumerate(answer)))
        right += scores.index(max(scores)) == row["answer"]
    return right / ITEMS
