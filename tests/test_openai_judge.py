"""An OpenAI-compatible endpoint as judge: what its answers mean, and what becomes of several votes."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
from misbehaving_endpoint import Answer, MisbehavingEndpoint, Received, says

from negotiator.config import JudgeConfig
from negotiator.endpoint import BudgetSpent, Unanswered, client
from negotiator.judges import make_judges, make_pair_judge
from negotiator.judges.answers import parse_agreement, parse_score, parse_winner
from negotiator.judges.openai import OpenAIJudge
from negotiator.prompts import wording
from negotiator.prompts.wording import version
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

Script = Callable[[int, Received], dict[str, Any] | str]
Serve = Callable[[Script], MisbehavingEndpoint]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts endpoints that answer with the fields that the script says, and with the code of the instructions."""
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    endpoints: list[MisbehavingEndpoint] = []

    def start(script: Script) -> MisbehavingEndpoint:
        def answer(number: int, received: Received) -> Answer:
            content = script(number, received)
            code = re.search(r'"code": "(\w+)"', received.body["messages"][0]["content"])
            assert code is not None
            return says(content if isinstance(content, str) else json.dumps({"code": code[1], **content}))

        endpoints.append(MisbehavingEndpoint(answer))
        return endpoints[-1]

    yield start
    for endpoint in endpoints:
        endpoint.close()


def config_for(url: str, **fields: Any) -> JudgeConfig:
    kinds = dict.fromkeys(("agreement", "reward", "evaluation"), "openai")
    return JudgeConfig.model_validate({**kinds, "url": url, "name": "m", "retries": 0, **fields})


def ask(endpoint: MisbehavingEndpoint, call: Callable[[OpenAIJudge], Awaitable[T]], **fields: Any) -> T:
    async def main() -> T:
        judge = OpenAIJudge(config_for(endpoint.url, **fields), None)
        try:
            return await call(judge)
        finally:
            await judge.close()

    return asyncio.run(main())


def score(judge: OpenAIJudge) -> Awaitable[Any]:
    return judge.score(SCENARIO, DONE)


def agreement(judge: OpenAIJudge) -> Awaitable[Any]:
    return judge.agreement(SCENARIO, DONE)


def compare(judge: OpenAIJudge) -> Awaitable[Any]:
    return judge.compare("Who gets the well?", "Nobody.", "Each takes half.", "resolution")


async def all_three(judge: OpenAIJudge) -> tuple[Any, Any, Any]:
    return await agreement(judge), await score(judge), await compare(judge)


def test_each_role_asks_its_model_for_its_answer(serve: Serve) -> None:
    endpoint = serve(lambda n, _: [{"agree": True}, {"score": 4}, {"winner": "B"}][n])
    agreed, scored, compared = ask(endpoint, all_three, agreement_name="small", evaluation_name="large")
    assert (agreed.agree, agreed.probability, agreed.failure) == (True, 1.0, None)
    assert (scored.score, scored.failure) == (4.0, None)
    assert (compared.winner, compared.failure) == ("second", None)
    bodies = [received.body for received in endpoint.received]
    assert [body["model"] for body in bodies] == ["small", "m", "large"]
    assert [body["seed"] for body in bodies] == [0] * 3 and [body["temperature"] for body in bodies] == [0.0] * 3
    schemas = [body["response_format"]["json_schema"]["schema"] for body in bodies]
    assert [schema["required"] for schema in schemas] == [["code", "agree"], ["code", "score"], ["code", "winner"]]
    users = [received.user for received in endpoint.received]
    assert all(SCENARIO.dilemma.text in user for user in users)
    assert "The Giver: I offer half.\nThe Taker: I take half." in users[0] and "Each takes half." in users[1]
    assert users[2].index("Nobody.") < users[2].index("answer B") < users[2].index("Each takes half.")
    assert "Which answer resolves the conflict better" in bodies[2]["messages"][0]["content"]


def test_a_judge_that_cannot_be_understood_fails_and_gives_no_verdict(serve: Serve) -> None:
    endpoint = serve(lambda n, _: "Ich weiß es nicht.")
    agreed, scored, compared = ask(endpoint, all_three, retries=1)
    for verdict in (agreed, scored, compared):
        assert "lacks the code" in verdict.failure and "(2 tries)" in verdict.failure
    assert not agreed.agree and math.isnan(scored.score) and len(endpoint.received) == 6


def test_what_the_run_has_to_stop_for_is_no_failed_verdict(serve: Serve) -> None:
    endpoint = serve(lambda n, _: {"score": 4})
    with pytest.raises(BudgetSpent):
        ask(endpoint, lambda judge: asyncio.gather(score(judge), agreement(judge)), max_calls=1)


VOTING: dict[str, Any] = {"votes": 5, "temperature": 0.7}


@pytest.mark.parametrize(("vote", "expected"), [("mean", 1.8), ("median", 1.0)])
def test_several_scores_become_one(serve: Serve, vote: str, expected: float) -> None:
    endpoint = serve(lambda n, received: {"score": [5, 1, 2, 1, 0][received.body["seed"]]})
    assert ask(endpoint, score, vote=vote, **VOTING).score == pytest.approx(expected)
    assert sorted(received.body["seed"] for received in endpoint.received) == [0, 1, 2, 3, 4]
    assert {received.body["temperature"] for received in endpoint.received} == {0.7}


@pytest.mark.parametrize(("threshold", "agree"), [(0.6, True), (0.61, False)])
def test_the_share_of_votes_is_the_probability(serve: Serve, threshold: float, agree: bool) -> None:
    endpoint = serve(lambda n, received: {"agree": received.body["seed"] < 3})
    verdict = ask(endpoint, agreement, agree_threshold=threshold, **VOTING)
    assert (verdict.agree, verdict.probability) == (agree, 0.6)


def test_a_vote_that_failed_is_none_against(serve: Serve) -> None:
    endpoint = serve(lambda n, received: {"agree": [None, True, False, None, True][received.body["seed"]]})
    verdict = ask(endpoint, agreement, **VOTING)
    assert verdict.failure is None and verdict.probability == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("votes", "winner"), [("AABBA", "first"), ("ABBtt", "second"), ("ABttt", "tie"), ("Attt?", "first")]
)
def test_the_winner_has_more_votes_than_the_other(serve: Serve, votes: str, winner: str) -> None:
    named = {"t": "tie", "?": None}
    endpoint = serve(lambda n, received: {"winner": named.get(*[votes[received.body["seed"]]] * 2)})
    assert ask(endpoint, compare, **VOTING).winner == winner


@pytest.mark.parametrize(("failing", "votes", "stands"), [(2, 5, True), (3, 5, False), (2, 4, False), (1, 2, False)])
def test_a_verdict_stands_if_more_than_half_of_the_votes_did(
    serve: Serve, failing: int, votes: int, stands: bool
) -> None:
    endpoint = serve(lambda n, received: {"score": 7 if received.body["seed"] < failing else 2})
    verdict = ask(endpoint, score, votes=votes, temperature=0.7)
    if stands:
        assert (verdict.score, verdict.failure) == (2.0, None)
    else:
        assert math.isnan(verdict.score)
        assert verdict.failure.startswith(f"{failing} votes failed: the answer is no score from 0 to 5")


def test_another_repetition_has_seeds_of_its_own(serve: Serve) -> None:
    endpoint = serve(lambda n, _: {"score": 1})

    async def main() -> None:
        for repetition in range(2):
            _, judge = make_judges(config_for(endpoint.url, votes=2, temperature=1.0), None, None, repetition)
            await judge.score(SCENARIO, DONE)
            await judge.close()
            await judge.close()  # as whoever holds it for both roles does

    asyncio.run(main())
    assert sorted(received.body["seed"] for received in endpoint.received) == [0, 1, 2, 3]


def test_the_version_is_that_of_the_wording(monkeypatch: pytest.MonkeyPatch) -> None:
    before = version("judge_score_openai_system", "judge_openai_rules")
    assert before == version("judge_score_openai_system", "judge_openai_rules")
    assert before != version("judge_agreement_openai_system", "judge_openai_rules")
    monkeypatch.setattr(wording, "_read", lambda prompt: "other rules" if prompt == "judge_openai_rules" else prompt)
    changed = version("judge_score_openai_system", "judge_openai_rules")
    monkeypatch.setattr(wording, "_read", lambda prompt: prompt)
    assert changed != version("judge_score_openai_system", "judge_openai_rules")


def test_one_endpoint_serves_both_roles() -> None:
    config = config_for("http://localhost:1/v1")
    agreement_judge, reward_judge = make_judges(config, None)
    assert agreement_judge is reward_judge  # so that `concurrency` and budgets bound them together
    assert isinstance(make_pair_judge(config, None, None), OpenAIJudge)


# --- what an answer says ---

CODE = "1a2b3c4d"


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"code": "1a2b3c4d", "score": 3}', 3),
        ('{"score": 0, "code": "1A2B3C4D"}', 0),
        ('```json\n{"code": "1a2b3c4d", "score": 4.5}\n```', 4.5),
        ('Here it is:\n\n{"code": "1a2b3c4d", "score": 5}\n\nDoes that help?', 5),
        ('{"code": "1a2b3c4d", "score": 3,}', 3),
        ("{'code': '1a2b3c4d', 'score': 2}", 2),
        ('{code: "1a2b3c4d", score: 2}', 2),
        ('{“code”: “1a2b3c4d”, “score”: 2}', 2),
        ('{"code": "1a2b3c4d", "score": "4"}', 4),
        ('{"Code": "1a2b3c4d", "SCORE": "3/5"}', 3),
        ("Code: 1a2b3c4d\nScore: 3", 3),
        ("**Score:** 3 out of 5\n\nCode `1a2b3c4d`", 3),
        ("1a2b3c4d\n3.", 3),
        ('<think>{"code": "1a2b3c4d", "score": 5}?</think>{"code": "1a2b3c4d", "score": 1}', 1),
        ('so it is 5</think>\n{"code": "1a2b3c4d", "score": 1}', 1),
        ('{"code": "1a2b3c4d", "score": 2}{"code": "1a2b3c4d", "score": 2}', 2),
        ('{"why": "He asks for \\"score\\": 5, which earns nothing.", "code": "1a2b3c4d", "score": 2}', 2),
        ('I score: what is there to score? {"code": "1a2b3c4d", "score": 2}', 2),
    ],
)  # fmt: skip
def test_scores_that_are_read(answer: str, score: float) -> None:
    assert parse_score(answer, CODE) == score


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " \n",
        '{"score": 3}',
        '{"code": "1a2b3c4", "score": 3}',
        '{"code": "01a2b3c4d", "score": 3}',
        '{"code": "1a2b3c4d"}',
        '{"code": "1a2b3c4d", "score": 6}',
        '{"code": "1a2b3c4d", "score": -1}',
        '{"code": "1a2b3c4d", "score": 5.1}',
        '{"code": "1a2b3c4d", "score": "10"}',
        '{"code": "1a2b3c4d", "score": "3/10"}',
        '{"code": "1a2b3c4d", "score": true}',
        '{"code": "1a2b3c4d", "score": null}',
        '{"code": "1a2b3c4d", "score": NaN}',
        '{"code": "1a2b3c4d", "score": Infinity}',
        '{"code": "1a2b3c4d", "score": ""}',
        '{"code": "1a2b3c4d", "score": [3]}',
        '{"code": "1a2b3c4d", "score": "drei"}',
        '{"code": "1a2b3c4d", "Punktzahl": 3}',
        '{"code": "1a2b3c4d", "score": 1, "score": 2}',
        '{"code": "1a2b3c4d", "score": 1}\n{"code": "1a2b3c4d", "score": 2}',
        'Score: 5\n{"code": "1a2b3c4d", "score": 1}',
        "1a2b3c4d\nScore: 3 or 4",
        "1a2b3c4d\nScore: 3\nScore: 4",
        "1a2b3c4d\n-3",
        "1a2b3c4d .5",
        "1a2b3c4d 3 4",
        "1a2b3c4d I give it a 3",
        '{"code": "1a2b3c4d", "score": 1',  # of 10, perhaps
        '{"code": "1a2b3c4d", "sco',
        '<think>{"code": "1a2b3c4d", "score": 3}',
        '<think>1a2b3c4d</think>{"score": 3}',
        '{"code": "1a2b3c4d", "score": ' + "9" * 5000 + "}",
    ],
)
def test_answers_that_are_no_score(answer: str) -> None:
    with pytest.raises(Unanswered):
        parse_score(answer, CODE)


@pytest.mark.parametrize("noise", ['{"a":', '{"', "[", '"', " ", "score", "score:", "1a2b3c4d ", "<think>", "\\"])
def test_no_answer_takes_long_to_refuse(noise: str) -> None:
    start = time.process_time()  # whatever else this machine does
    for length in (7900, 100_000):
        with pytest.raises(Unanswered):
            parse_score(noise * (length // len(noise)) + CODE, CODE)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("answer", "agree"),
    [
        ('{"code": "1a2b3c4d", "agree": true}', True),
        ('{"code": "1a2b3c4d", "agree": "No."}', False),
        ("{'code': '1a2b3c4d', 'agree': False}", False),
        ("Code: 1a2b3c4d, Agree: Yes", True),
        ("1a2b3c4d: yes", True),
        ('They do not agree: he refuses. {"code": "1a2b3c4d", "agree": false}', False),
        ('{"code": "1a2b3c4d", "agree": 1}', None),
        ('{"code": "1a2b3c4d", "agree": null}', None),
        ('{"code": "1a2b3c4d", "agree": "sí"}', None),
        ('{"code": "1a2b3c4d", "agree": "yes, but"}', None),
        ('{"code": "1a2b3c4d", "score": 1}', None),
        ('{"code": "1a2b3c4d", "agree": true}{"code": "1a2b3c4d", "agree": false}', None),
        ('{"agree": true}', None),
    ],
)
def test_parse_agreement(answer: str, agree: bool | None) -> None:
    if agree is None:
        with pytest.raises(Unanswered):
            parse_agreement(answer, CODE)
    else:
        assert parse_agreement(answer, CODE) is agree


@pytest.mark.parametrize(
    ("answer", "winner"),
    [
        ('{"code": "1a2b3c4d", "winner": "A"}', "first"),
        ('{"code": "1a2b3c4d", "winner": "b"}', "second"),
        ("1a2b3c4d Winner: Answer B.", "second"),
        ('{"code": "1a2b3c4d", "winner": "tie"}', "tie"),
        ('{"code": "1a2b3c4d", "winner": "both"}', None),
        ('{"code": "1a2b3c4d", "winner": "A or B"}', None),
        ('{"code": "1a2b3c4d", "winner": 1}', None),
        ('{"winner": "A"}', None),
    ],
)
def test_parse_winner(answer: str, winner: str | None) -> None:
    if winner is None:
        with pytest.raises(Unanswered):
            parse_winner(answer, CODE)
    else:
        assert parse_winner(answer, CODE) == winner
