"""Data files: the shipped ones hold what they should, bad lines are named, drawings depend on seed and step alone."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from negotiator.data import draw_scenarios, load_dilemmas, load_eval_conflict, load_eval_open, load_personas, split
from negotiator.data.__main__ import main
from negotiator.data.likeness import closest_pair, is_running_english, normalized, similar_pairs
from negotiator.seeds import derive_seed
from negotiator.types import Dilemma, Persona, PersonaPair

DILEMMAS = [Dilemma(f"d{i}", "", "", f"What about {i}?") for i in range(40)]
PAIRS = [PersonaPair(f"p{i}", "", Persona(f"A{i}", "You."), Persona(f"B{i}", "You too.")) for i in range(5)]


def test_shipped_files_hold_what_they_should() -> None:
    dilemmas, pairs = load_dilemmas(), load_personas()
    assert Counter(d.category for d in dilemmas) == {"professional": 440, "interpersonal": 440, "everyday": 220}
    assert set(Counter(d.domain for d in dilemmas).values()) == {10}
    assert len({d.text for d in dilemmas}) == 1100 and all("?" in d.text for d in dilemmas)
    assert len(pairs) == 25 and len({p.name for pair in pairs for p in (pair.a, pair.b)}) == 50
    assert all(pair.tension for pair in pairs)


def test_evaluation_sets_share_nothing_with_the_dilemmas() -> None:
    conflicts, questions = load_eval_conflict(), load_eval_open()
    assert len(conflicts) == len(questions) == 100
    assert [s.index for s in conflicts] == list(range(100))
    assert all(s.agent1.text and s.agent2.text and s.agent1 != s.agent2 for s in conflicts)
    texts = [d.text for d in load_dilemmas()] + [s.dilemma.text for s in conflicts] + [q.text for q in questions]
    assert closest_pair(texts)[0] < 0.1


def test_a_users_dilemmas_need_only_id_and_text(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes('\ufeff{"id": "a", "text": " Où\u2028? "}\r\n\n{"id": "b", "text": "?", "category": "x"}'.encode())
    assert load_dilemmas(path) == [Dilemma("a", "", "", "Où\u2028?"), Dilemma("b", "x", "", "?")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "b"}', 'field "text" is missing'),
        (b'{"text": "?"}', 'field "id" is missing'),
        (b'{"id": "b", "text": " "}', 'field "text" is empty'),
        (b'{"id": "b", "text": null}', 'field "text" must be a string, not null'),
        (b'{"id": 7, "text": "?"}', 'field "id" must be a string, not 7'),
        (b'{"id": "b", "text": "?", "category": ["x"]}', 'field "category" must be a string, not ["x"]'),
        (b'{"id": "a", "text": "?"}', 'id "a" is already used in line 1'),
        (b'{"id": "b", "text": "?"', "not valid JSON"),
        (b'["b", "?"]', "must be a JSON object"),
        (b'{"id": "b", "text": "\xff"}', "not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "my.jsonl"
    path.write_bytes(b'{"id": "a", "text": "?"}\n\n' + line)
    with pytest.raises(ValueError) as error:
        load_dilemmas(path)
    assert str(error.value).startswith(f"{path}:3: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": "x", "b": {}}, 'field "a" must be an object with "name" and "persona"'),
        ({"id": "x", "a": {"name": "N", "persona": ""}, "b": {}}, 'field "a.persona" is empty'),
        ({"id": "x", "a": {"name": "N", "persona": "P"}, "b": {"persona": "P"}}, 'field "b.name" is missing'),
    ],
)
def test_a_bad_persona_is_named(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    path = tmp_path / "personas.jsonl"
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f":1: {message}"):
        load_personas(path)


def test_no_file_and_no_lines_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_dilemmas(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no lines"):
        load_dilemmas(tmp_path / "empty.jsonl")


def test_split_moves_nobody_when_items_come_or_change_order() -> None:
    dilemmas = load_dilemmas()
    train, held = split(dilemmas, 0.05)
    assert 35 <= len(held) <= 75 and len(train) + len(held) == 1100
    shuffled = random.Random(0).sample(dilemmas, 600)
    some_train, some_held = split(shuffled, 0.05)
    assert set(some_train) <= set(train) and set(some_held) <= set(held)
    assert set(held) < set(split(dilemmas, 0.2)[1])  # a larger share only adds
    assert split(dilemmas, 0.0) == (dilemmas, [])


def test_split_refuses_to_leave_nothing() -> None:
    with pytest.raises(ValueError, match="leaves none of the 1 dilemmas to train on"):
        split([Dilemma("x", "", "", "?")], 1 - 1e-9)


def test_an_epoch_shows_every_dilemma_once_and_the_next_in_another_order() -> None:
    drawn = [s for step in range(20) for s in draw_scenarios(DILEMMAS, PAIRS, seed=3, step=step, count=6)]  # 3 epochs
    epochs = [[s.dilemma.id for s in drawn[start : start + 40]] for start in (0, 40, 80)]
    assert all(sorted(ids) == sorted(d.id for d in DILEMMAS) for ids in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [d.id for d in DILEMMAS]


def test_a_drawing_depends_on_seed_and_step_alone() -> None:
    def draw(seed: int, step: int) -> list[object]:
        return list(draw_scenarios(DILEMMAS, PAIRS, seed, step, 6))

    assert draw(3, 7) == draw(3, 7)
    assert draw(3, 7) != draw(4, 7)
    assert draw(3, 7) != draw(3, 8)
    # Pinned: a resumed run must draw the same under any Python and release.
    assert [(s.dilemma.id, s.pair_id, s.agent1.name) for s in draw_scenarios(DILEMMAS, PAIRS, 3, 7, 3)] == [
        ("d16", "p1", "B1"),
        ("d25", "p3", "B3"),
        ("d29", "p0", "B0"),
    ]


def test_pairs_and_speaking_order_are_drawn_evenly() -> None:
    drawn = [s for step in range(200) for s in draw_scenarios(DILEMMAS, PAIRS, seed=0, step=step, count=5)]
    pairs = Counter(s.pair_id for s in drawn)
    assert set(pairs) == {p.id for p in PAIRS} and min(pairs.values()) > 150  # of 200 expected
    assert 420 < sum(s.agent1.name.startswith("A") for s in drawn) < 580
    assert all({s.agent1, s.agent2} == {p.a, p.b} for s in drawn for p in PAIRS if p.id == s.pair_id)
    # The order is drawn for each scenario, not with the pair or the place.
    assert len({(s.pair_id, s.agent1.name) for s in drawn}) == 10


def test_seeds_tell_parts_types_and_places_apart() -> None:
    seeds = [derive_seed(*p) for p in [("ab", "c"), ("a", "bc"), (1,), ("1",), (1, 2), (2, 1), (12,), (-1,), (), ("",)]]
    assert len(set(seeds)) == len(seeds)
    many = [derive_seed(0, "utterance", i) for i in range(2000)]
    assert all(0 <= s < 2**63 for s in many) and max(many) > 2**62 and len({s % 1000 for s in many}) > 800
    assert derive_seed(0, "utterance", 1, 2, 3) == 8852360855177297331


def test_closest_pair_against_all_pairs() -> None:
    rng = random.Random(1)
    texts = [" ".join(rng.choice("abcd") for _ in range(rng.randint(3, 12))) for _ in range(30)]

    def jaccard(one: str, two: str) -> float:
        a, b = (set(zip(t.split(), t.split()[1:], t.split()[2:], strict=False)) for t in (one, two))
        return len(a & b) / len(a | b)

    best = max(jaccard(texts[i], texts[j]) for j in range(30) for i in range(j))
    similarity, i, j = closest_pair(texts)
    assert similarity == best == jaccard(texts[i], texts[j]) and i != j


def test_similar_pairs_are_all_that_share_anything() -> None:
    texts = ["one two three four", "nothing in common", "One, two; three!", "two three four five"]
    assert sorted(similar_pairs(texts)) == [(1 / 3, 0, 3), (1 / 2, 0, 2)]
    assert normalized(texts[2]) == "one two three" != normalized(texts[0])


SHIPPED_TEXT = load_dilemmas()[0].text


@pytest.mark.parametrize(
    ("text", "english"),
    [
        (SHIPPED_TEXT, True),
        ("Anaïs and Jürgen rent a shop in Łódź, and each of them wants the window for the work that they sell.", True),
        ("Les deux voisins se disputent le jardin, et chacun veut y planter ses propres arbres avant la fin.", False),
        ("The shop is the shop of the shop and the shop is the shop of the shop, so the shop is the shop.", False),
        ("Both of them ate and he ran, but she did not; " * 2 + "so we sat.", False),
        ("Kettle window seven orange bridge Tuesday carpet lamp forest engine paper wheat copper garden.", False),
        ("Дом и сад the shop and the house, and they will be sold to who will pay for it all at once.", False),
        ("a 1,200 $ & 3,400 $ -- in 5/6/2019, or (7:8:9) = 55 % of the 90 + 80 + 70 for 60 of us...!!", False),
        ("", False),
    ],
)
def test_running_english_is_told_from_the_rest(text: str, english: bool) -> None:
    assert is_running_english(text) is english


def test_check_describes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "my.jsonl"
    same = "one two three four?"
    items = [("a", same, "x"), ("b", "One two three: four", "x"), ("c", "one two three five six?", "y")]
    lines = [{"id": i, "text": t, "category": c, "source": {"model": "M"}} for i, t, c in items]
    path.write_text("\n".join(map(json.dumps, [*lines, {"id": "d", "text": "seven eight nine", "source": "mine"}])))
    assert main(["check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "4 dilemmas of 3 to 5 words, median 4" in out and "same text: a and b" in out
    assert "more): 1\n    0.250 a and c" in out and "category: x 2, y 1" in out and "written by: M 3" in out


def test_check_compares_files_with_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    party = {"name": "N", "persona": "you want this and that"}
    one.write_text(json.dumps({"id": "p", "tension": "T", "a": party, "b": party}))
    other.write_text(json.dumps({"id": "q", "topic": "music", "text": "Who wants this and that?"}))
    assert main(["check", str(one), str(other)]) == 0
    out = capsys.readouterr().out
    assert "1 persona pairs of 5 to 5 words" in out and "same text: p.a and p.b" in out and "same name" in out
    assert "1 questions of 5 to 5 words" in out and "topic: music 1" in out
    assert "across files\n  near-duplicates (3-gram Jaccard of 0.15 or more): 2\n    0.200 p.a and q\n" in out


def test_check_command_ends_with_2_and_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text('{"id": "a", "text": "?"}\n{"id": "b"}\n')
    done = subprocess.run([sys.executable, "-m", "negotiator.data", "check", path], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f'{path}:2: field "text" is missing\n'
