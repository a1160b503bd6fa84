"""Who writes a draft: a model behind an OpenAI-compatible endpoint, or a local one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from negotiator.config import Config, EndpointConfig, EngineConfig
from negotiator.endpoint import Endpoint, Request
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.generate.items import LENGTHS, Cell, Draft, Example, Kind, from_json, from_plain, json_schema, to_plain
from negotiator.models import choose_device, choose_dtype, load_model, load_tokenizer
from negotiator.prompts.templates import stop_ids
from negotiator.prompts.wording import fill
from negotiator.types import SamplingParams

TOP_P = 0.95
ENDPOINT_TOKENS = 2048  # of an answer; what a model thinks before it counts as well
LOCAL_ENGINE = EngineConfig(max_running=16, cache_tokens=16384)


@dataclass(frozen=True, slots=True)
class Task:
    """One draft to write. `examples` are shown; `seed` makes another try another draft."""

    kind: Kind
    cell: Cell
    examples: Sequence[Example]
    seed: int
    temperature: float


class Writer(Protocol):
    name: str  # of the model, as it is noted with each item
    at_once: int  # drafts that are worth writing at the same time
    path: str  # what computes, in a few words

    def version(self, kind: Kind) -> str:
        """Changes with the wording of the prompts."""
        ...

    async def write(self, task: Task) -> str:
        """The model's answer. Raises `endpoint.Unanswered` if there is none, RuntimeError if there will not be any."""
        ...

    def read(self, kind: Kind, answer: str) -> Draft | None: ...

    async def close(self) -> None: ...


class EndpointWriter:
    """Asks for JSON. Answers, and what was spent of the budget, are kept in `store`.

    Raises ValueError for a bad URL or a missing key.
    """

    def __init__(self, config: EndpointConfig, store: Path) -> None:
        assert config.url and config.name, "the command line asks for both"
        self._endpoint = Endpoint(config, store)
        self.name = config.name
        self.at_once = config.concurrency
        self.path = f"{config.name} at {config.url}"

    def version(self, kind: Kind) -> str:
        user = fill("generate_user", subject="$subject", examples="$examples")
        return _hash(fill(f"generate_{kind}_system"), user)

    async def write(self, task: Task) -> str:
        shown = "\n".join(json.dumps(example.draft, ensure_ascii=False) for example in task.examples)
        request = Request(
            name=self.name,
            system=fill(f"generate_{task.kind}_system"),
            user=fill("generate_user", subject=f"{str(task.cell).capitalize()}.", examples=shown),
            version=self.version(task.kind),
            temperature=task.temperature,
            top_p=TOP_P,
            max_tokens=ENDPOINT_TOKENS,
            seed=task.seed,
            schema=json_schema(task.kind),
        )
        # An unreadable answer is refused like any other: the next try has another seed.
        return await self._endpoint.ask(request, str)

    def read(self, kind: Kind, answer: str) -> Draft | None:
        return from_json(kind, answer)

    async def close(self) -> None:
        await self._endpoint.close()


class LocalWriter:
    """Shows its examples as earlier turns of a chat, which small models follow far better than any description.

    Raises ValueError if there is no model, or it has no chat template.
    """

    def __init__(self, config: Config) -> None:
        device = choose_device(config.model.device)
        dtype, why = choose_dtype(config.model.dtype, device)
        self._tokenizer = load_tokenizer(config.model.path)
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {config.model.path} has no chat template: use an instruct model")
        model = load_model(config.model.path, device, dtype)
        self._engine = EmbeddedEngine(model, LOCAL_ENGINE)
        eos = model.generation_config.eos_token_id if model.generation_config else None
        self._stop_ids = stop_ids(self._tokenizer, eos)
        self.name = Path(config.model.path).resolve().name
        self.at_once = LOCAL_ENGINE.max_running
        self.path = (
            f"{config.model.path} on {device.type} in {str(dtype).removeprefix('torch.')} ({why}), {self._engine.path}"
        )

    def version(self, kind: Kind) -> str:
        return _hash(fill(f"generate_{kind}_local", subject="$subject"))

    async def write(self, task: Task) -> str:
        wording = f"generate_{task.kind}_local"
        turns: list[str] = []
        for example in task.examples:
            turns += [fill(wording, subject=example.subject), to_plain(example.draft)]
        turns.append(fill(wording, subject=task.cell.domain))
        messages = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        prompt = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        sampling = SamplingParams(
            max_tokens=2 * sum(most for _, most in LENGTHS[task.kind].values()),
            temperature=task.temperature,
            top_p=TOP_P,
            seed=task.seed,
            stop_ids=self._stop_ids,
        )
        generation = await self._engine.generate(
            self._tokenizer.encode(str(prompt), add_special_tokens=False), sampling
        )
        written = generation.ids[:-1] if generation.finish_reason == "stop" else generation.ids
        # Control tokens are kept, for the filters to see.
        return str(self._tokenizer.decode(list(written), clean_up_tokenization_spaces=False))

    def read(self, kind: Kind, answer: str) -> Draft | None:
        return from_plain(kind, answer)

    async def close(self) -> None:
        await self._engine.close()


def _hash(*wording: str) -> str:
    return hashlib.blake2b("\0".join(wording).encode(), digest_size=6).hexdigest()
