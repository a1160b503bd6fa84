"""From scenarios and texts to the exact token ids of every prompt.

A prompt is a system message (persona or task) and a user message, put through the model's own chat template. The
discussion is quoted inside the user message, a line for each utterance, so any template does, also one that insists on
alternating roles. Where a template has no system role its text heads the first user message.

Texts that come from data or from a model cannot forge the template's control tokens: whatever spells one is blanked.
(Markers that a template writes in plain words, as some do with "[INST]", are no tokens, and stay.)
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from negotiator.prompts.wording import examples, fill, one_line, spoken
from negotiator.types import Agent, Scenario

_PROBE = "zebra"  # a word to look for in what a chat template renders


class Templates:
    """Assembles the prompts of one tokenizer. Raises ValueError if it has no chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {tokenizer.name_or_path} has no chat template: use an instruct model")
        self._tokenizer = tokenizer
        self._has_system_role = _has_system_role(tokenizer)
        self._control = _control_pattern(tokenizer)
        self._prefix_of = functools.lru_cache(maxsize=4096)(self._common_prefix)

    def utterance_prompt(
        self, scenario: Scenario, agent: Agent, texts: Sequence[str], window: int | Literal["all"]
    ) -> tuple[tuple[int, ...], int]:
        """(prompt ids, prefix length) for `agent`'s next utterance.

        `texts` are all utterances so far, agent 1's first; the prompt shows the last `window` of them. Its first
        prefix-length ids are `prefix_ids(scenario, agent)`.
        """
        first = 0 if window == "all" else max(0, len(texts) - window)
        own = 0 if agent == "agent1" else 1
        shown = [
            f"{'You' if turn % 2 == own else 'They'} said: {one_line(texts[turn])}" for turn in range(first, len(texts))
        ]
        ids = self._utterance_ids(scenario, agent, "\n".join(shown))
        prefix = self.prefix_ids(scenario, agent)
        assert ids[: len(prefix)] == prefix, "a prompt does not begin with the prefix it is said to share"
        return ids, len(prefix)

    def prefix_ids(self, scenario: Scenario, agent: Agent) -> tuple[int, ...]:
        """What all prompts of `agent` in the scenario begin with: persona and dilemma, up to the discussion."""
        return self._prefix_of(scenario, agent)

    def completion_prompt(self, scenario: Scenario, texts: Sequence[str]) -> tuple[int, ...]:
        """Asks agent 1 for the final solution, from the dilemma, both personas and the whole dialogue."""
        one, two = scenario.agent1, scenario.agent2
        names = {"name_1": one.name, "persona_1": one.text, "name_2": two.name, "persona_2": two.text}
        system = self._fill("complete_system", **names)
        user = self._fill("complete_user", dilemma=scenario.dilemma.text, dialogue=spoken(scenario, texts))
        return self._ids(system, [user])

    def completion_prefix(self, scenario: Scenario) -> tuple[int, ...]:
        """What all completion prompts of the scenario begin with: personas and dilemma, up to the dialogue."""
        return _shared([self.completion_prompt(scenario, [text]) for text in ("", _PROBE)])

    def answer_prompt(self, question: str) -> tuple[int, ...]:
        """Asks one agent alone, without a persona, for a solution or an answer."""
        return self._ids(fill("answer_system"), [self._fill("answer_user", question=question)])

    def agreement_prompt(self, scenario: Scenario, texts: Sequence[str]) -> tuple[int, ...]:
        """Asks the local judge for Yes or No: does the last speaker accept what the other said just before?

        Two utterances are what a small model can still judge. `scenario` plays no part in it.
        """
        first, second = (["", "", *texts])[-2:]
        user = self._fill("judge_agreement_local_user", first=one_line(first), second=one_line(second))
        return self._with_examples("judge_agreement_local", user)

    def score_prompt(self, scenario: Scenario, completion: str) -> tuple[int, ...]:
        """Asks the local judge for a digit from 0 to 5: how far does the completion serve Collective Agency?"""
        user = self._fill("judge_score_local_user", completion=one_line(completion))
        return self._with_examples("judge_score_local", user)

    def comparison_prompt(self, first: str, second: str, criterion: str) -> tuple[int, ...]:
        """Asks the local judge for Yes or No: is the second of two answers to one question the better by `criterion`?

        Without the question, as in `score_prompt`: a dilemma only distracts a small model.
        """
        user = self._fill("judge_compare_local_user", first=one_line(first), second=one_line(second))
        return self._with_examples("judge_compare_local", user, fill(f"judge_compare_local_{criterion}"))

    def comparison_prefix(self, criterion: str) -> tuple[int, ...]:
        """What all comparisons by a criterion begin with: the task and its examples."""
        return _shared([self.comparison_prompt(text, text, criterion) for text in ("horse", '"', "First: ")])

    def judge_prefixes(self) -> tuple[tuple[int, ...], ...]:
        """What all agreement prompts begin with, and what all score prompts do: the task and its examples."""
        return tuple(
            _shared([self._with_examples(prompt, user) for user in ("horse", '"', "First: ")])
            for prompt in ("judge_agreement_local", "judge_score_local")
        )

    def single_tokens(self, *spellings: str) -> tuple[int, ...]:
        """The ids of those spellings that are one token. Raises ValueError if none is."""
        encoded = [self._tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
        ids = tuple(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))
        if not ids:
            raise ValueError(f"the tokenizer has no single token for any of {spellings}: use a judge that is not local")
        return ids

    def _common_prefix(self, scenario: Scenario, agent: Agent) -> tuple[int, ...]:
        # Every way in which what follows the dilemma can start, so that tokens which reach over that border are out.
        starts = [self._utterance_ids(scenario, agent, shown) for shown in ("", "You said:", "They said:")]
        return _shared(starts)

    def _utterance_ids(self, scenario: Scenario, agent: Agent, shown: str) -> tuple[int, ...]:
        persona = scenario.persona(agent)
        system = self._fill("negotiate_system", name=persona.name, persona=persona.text)
        if not shown:
            return self._ids(system, [self._fill("negotiate_open", dilemma=scenario.dilemma.text)])
        return self._ids(system, [self._fill("negotiate_turn", dilemma=scenario.dilemma.text, window=shown)])

    def _with_examples(self, prompt: str, user: str, system: str | None = None) -> tuple[int, ...]:
        # As earlier turns, not as text: small models follow these far better.
        shots = [text for example in examples(f"{prompt}_examples") for text in example]
        return self._ids(system or fill(f"{prompt}_system"), [*shots, user])

    def _fill(self, prompt: str, /, **values: str) -> str:
        return fill(prompt, **{place: _blank(value, self._control) for place, value in values.items()})

    def _ids(self, system: str, turns: Sequence[str]) -> tuple[int, ...]:
        """`turns` alternate between user and assistant, and end with the user's."""
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        if self._has_system_role:
            messages.insert(0, {"role": "system", "content": system})
        else:
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        rendered = _render(self._tokenizer, messages, reply=True)
        return tuple(self._tokenizer.encode(rendered, add_special_tokens=False))  # the template wrote them all


def stop_ids(tokenizer: PreTrainedTokenizerBase, eos_token_id: int | Sequence[int] | None) -> tuple[int, ...]:
    """The ids that end a reply: the model's (from its generation config), the tokenizer's and the chat template's."""
    turn = [{"role": "user", "content": "horse"}, {"role": "assistant", "content": _PROBE}]
    behind = tokenizer.encode(_render(tokenizer, turn, reply=False).rpartition(_PROBE)[2], add_special_tokens=False)
    added = tokenizer.added_tokens_decoder
    found = {token for token in behind[:1] if token in added and added[token].special}
    found.update([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or [])
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def _blank(text: str, control: re.Pattern[str]) -> str:
    """`text` with a space for whatever `control` matches, until nothing does."""
    while control.search(text):
        text = control.sub(" ", text)
    return text


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the spelling of every control token, also those like <think> that the tokenizer does not call special."""
    added = tokenizer.added_tokens_decoder.values()
    spelled = {token.content for token in added if token.special or re.search(r"[<\[|]", token.content)}
    longest_first = sorted(spelled, key=lambda s: (-len(s), s))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template shows a system message at its head, rather than rejecting, dropping or moving it."""
    messages = [
        {"role": "system", "content": _PROBE},
        {"role": "user", "content": "horse"},
        {"role": "assistant", "content": "donkey"},
        {"role": "user", "content": "mule"},
    ]
    try:
        before, shown, _ = _render(tokenizer, messages, reply=True).partition(_PROBE)
    except jinja2.TemplateError:  # what a template's raise_exception raises
        return False
    return bool(shown) and "horse" not in before


def _shared(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The ids that all of them begin with."""
    columns = zip(*prompts, strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], reply: bool) -> str:
    return str(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply, enable_thinking=False)
    )
