"""From a configuration to everything a run needs, checked in the order in which mistakes are cheapest to find."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from negotiator import checkpoint
from negotiator.config import Config
from negotiator.data import load_dilemmas, load_personas, split
from negotiator.dialogue import AGENTS, Table
from negotiator.engines.base import Engine, LeadersEngine
from negotiator.engines.embedded import EmbeddedEngine
from negotiator.engines.sglang import SGLangEngine
from negotiator.engines.sglang_http import find_servers
from negotiator.engines.sglang_server import ServerSettings
from negotiator.judges import LocalJudge, make_judges
from negotiator.learner import Learner
from negotiator.lora import load_adapted, require_packages
from negotiator.models import (
    choose_device,
    choose_dtype,
    load_model,
    load_model_config,
    load_tokenizer,
)
from negotiator.parallel import ALONE, Sharding, World
from negotiator.plan import Lengths, Place, Plan, available_memory, make_plan
from negotiator.prompts.templates import Templates, stop_ids
from negotiator.types import Dilemma, PersonaPair, Scenario


@dataclass(frozen=True, slots=True)
class Checked:
    """A run that can start: configuration, data, wording and sizes fit together; no weights are loaded yet."""

    config: Config
    world: World
    dilemmas: list[Dilemma]  # that are trained on
    held_out: list[Dilemma]
    pairs: list[PersonaPair]
    tokenizer: PreTrainedTokenizerBase
    templates: Templates
    device: torch.device
    dtype: torch.dtype
    why_dtype: str
    servers: list[ServerSettings]  # of SGLang, where the trainer is to start some
    plan: Plan


@dataclass(frozen=True, slots=True)
class LocalJudging:
    """The judge that needs a model, and the engine that serves it: the frozen initial policy."""

    judge: LocalJudge
    engine: EmbeddedEngine


@dataclass(frozen=True, slots=True)
class Run:
    """What the training loop works with."""

    checked: Checked
    table: Table
    local: LocalJudging | None  # None when no judge is local
    learner: Learner
    served: PreTrainedModel  # the policy as the engine serves it: the trained model itself, or a copy in plain weights
    steps_done: int

    @property
    def generates(self) -> bool:
        """Whether this process negotiates; the servers that all of them share are the leader's alone."""
        return not isinstance(self.table.engine, LeadersEngine)

    def serve(self) -> Iterable[tuple[str, torch.Tensor]]:
        """The newest weights, for the engine. Where they are sharded all processes have to call this together."""
        own = dict(self.served.named_parameters())
        with torch.no_grad():
            for name, tensor in self.learner.weights():
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        return own.items()


def check(config: Config, world: World = ALONE, here: bool = True) -> Checked:
    """Raises ValueError or OSError with one sentence for whatever the user has to change.

    Not `here`: for a plan of a run on other machines; they are taken to have the device that is configured.
    """
    dilemmas, held_out = split(load_dilemmas(config.data.dilemmas), config.data.held_out)
    if config.evaluation.every and not held_out:
        raise ValueError("evaluation.every needs dilemmas that are not trained on: raise data.held_out")
    pairs = load_personas(config.data.personas)
    require_packages(config.lora)
    if here or config.model.device == "auto":
        device = choose_device(config.model.device, world.local_rank)
    else:
        device = torch.device(config.model.device)
    dtype, why_dtype = choose_dtype(config.model.dtype, device)
    model_config = load_model_config(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    templates = Templates(tokenizer)
    servers = _servers(config, device, dtype)
    lengths = _longest_prompts(config, templates, dilemmas, pairs)
    place = Place(device, dtype, world.size, available_memory(device) if here else None)
    plan = make_plan(config, model_config, lengths, place)
    return Checked(
        config, world, dilemmas, held_out, pairs, tokenizer, templates, device, dtype, why_dtype, servers, plan
    )


def prepare(checked: Checked, resume_from: tuple[int, Path] | None, folder: Path) -> Run:
    """Loads weights, engines and judges; from a checkpoint (steps done, path) where there is one.

    Writes nothing; `folder` is the run's, where servers that the trainer starts will log.
    """
    config = checked.config
    urls: list[str] = []
    if config.engine.kind == "sglang" and checked.world.leads:
        urls = find_servers(config.engine.urls)
    local = _local_judging(checked) if _uses_local_judge(config) else None
    judges = config.judge
    if judges.reward == "self":  # comes with the policy's engine, below
        judges = judges.model_copy(update={"reward": judges.agreement})
    agreement, reward = make_judges(judges, local.judge if local else None, folder / "judge.sqlite")
    steps_done, weights = resume_from or (0, Path(config.model.path))
    learner = _learner(checked, weights)
    # One process that trains all weights generates with the very same.
    apart = learner.adapted or checked.world.size > 1
    served = load_model(config.model.path, checked.device, checked.dtype) if apart else learner.model
    if resume_from:
        checkpoint.load_trainer(weights, learner)
    engine = _policy_engine(checked, urls, served, folder)
    if config.judge.reward == "self":
        reward = LocalJudge(engine, checked.templates, config.judge.agree_threshold)
    table = Table(
        engine=engine,
        tokenizer=checked.tokenizer,
        templates=checked.templates,
        stop_ids=stop_ids(checked.tokenizer, served.generation_config.eos_token_id),
        agreement=agreement,
        reward=reward,
        config=config.dialogue,
        seed=config.seed,
        mode=config.mode,
    )
    return Run(checked, table, local, learner, served, steps_done)


def _learner(checked: Checked, weights: Path) -> Learner:
    config, device = checked.config, checked.device
    sharding = None
    if checked.world.size > 1:
        sizes = config.parallel.replicas, config.parallel.offload
        sharding = Sharding(checked.world, checked.dtype, *sizes, replicate=config.lora.rank > 0)
    dtype = torch.float32 if sharding and not sharding.replicate else checked.dtype  # masters are what is sharded
    if config.lora.rank:
        model = load_adapted(config.model.path, device, dtype, config.lora)
    else:
        model = load_model(weights, device, dtype)
    reference = None
    if config.loss.beta and not config.lora.rank:
        reference = load_model(config.model.path, device, dtype)
    return Learner(model, config.optimizer, config.loss, config.dialogue.temperature, sharding, reference)


def _policy_engine(checked: Checked, urls: list[str], model: PreTrainedModel, folder: Path) -> Engine:
    config = checked.config.engine
    if config.kind == "embedded":
        return EmbeddedEngine(model, config)
    if (config.urls or config.gpus) and not checked.world.leads:
        return LeadersEngine()
    return SGLangEngine(urls or checked.servers, config, folder, same_gpu=not (urls or config.gpus))


def _servers(config: Config, device: torch.device, dtype: torch.dtype) -> list[ServerSettings]:
    """The SGLang servers that the trainer starts for itself."""
    engine = config.engine
    if engine.kind == "embedded" or engine.urls:
        return []
    gpus = engine.gpus or ([device.index or 0] * engine.servers if device.type == "cuda" else [])
    each = len(gpus) // engine.servers
    return [
        ServerSettings(
            python=engine.python,
            model=Path(config.model.path),
            dtype="bfloat16" if dtype == torch.bfloat16 else "float32",
            device="cuda" if gpus else "cpu",
            gpus=tuple(gpus[number * each : (number + 1) * each]),
            max_total_tokens=engine.cache_tokens,
            max_running=engine.max_running,
            prefill_tokens=engine.prefill_tokens,
            memory_saver=bool(gpus) and not engine.gpus,
        )
        for number in range(engine.servers)
    ]


def _local_judging(checked: Checked) -> LocalJudging:
    config = checked.config
    model = load_model(config.model.path, checked.device, checked.dtype).requires_grad_(False)
    engine = EmbeddedEngine(model, config.engine)
    return LocalJudging(LocalJudge(engine, checked.templates, config.judge.agree_threshold), engine)


def _uses_local_judge(config: Config) -> bool:
    return "local" in (config.judge.agreement, config.judge.reward)


def _longest_prompts(
    config: Config, templates: Templates, dilemmas: list[Dilemma], pairs: list[PersonaPair]
) -> Lengths:
    """Tokenizes the longest dilemmas with the longest personas; length in characters finds them well enough."""
    pair = max(pairs, key=lambda p: len(p.a.text) + len(p.b.text))
    longest = sorted(dilemmas, key=lambda dilemma: len(dilemma.text))[-8:]
    scenarios = [Scenario(0, dilemma, pair.a, pair.b, pair.id) for dilemma in longest]
    judged = [
        *(templates.agreement_prompt(s, []) for s in scenarios),
        *(templates.score_prompt(s, "") for s in scenarios),
    ]
    judge_prompt = max(map(len, judged)) if _uses_local_judge(config) or config.judge.reward == "self" else 0
    if config.mode == "single":
        alone = max(len(templates.answer_prompt(dilemma.text)) for dilemma in longest)
        return Lengths(utterance_prompt=alone, utterance_prefix=alone, completion_prompt=0, judge_prompt=judge_prompt)
    prompts = [templates.utterance_prompt(scenario, agent, [], "all") for scenario in scenarios for agent in AGENTS]
    return Lengths(
        utterance_prompt=max(len(ids) for ids, _ in prompts),
        utterance_prefix=max(prefix for _, prefix in prompts),
        completion_prompt=max(len(templates.completion_prompt(s, [])) for s in scenarios),
        judge_prompt=judge_prompt,
    )
