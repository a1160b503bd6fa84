"""The one configuration of a run: typed, validated, unknown keys rejected.

A value comes from the defaults below, then the YAML file of `--config`, then `--section.key value`. Presets are the
files in `configs/`. What was resolved is written to `runs/<name>/config.yaml`, which is itself a valid `--config`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Self, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, coerce_numbers_to_str=True)


class ModelConfig(Section):
    path: str = Field("models/SmolLM2-135M-Instruct", description="folder with a Hugging Face causal LM and tokenizer")
    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="compute precision; auto is bf16 where the device multiplies it natively, else fp32"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is cuda where there is one")


class DataConfig(Section):
    dilemmas: Path | None = Field(None, description="JSONL file of dilemmas; the shipped 1,100 when left out")
    personas: Path | None = Field(None, description="JSONL file of persona pairs; the shipped 25 when left out")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of dilemmas that is never trained on")


class DialogueConfig(Section):
    max_rounds: int = Field(7, ge=1, description="rounds (one utterance each) before a dialogue ends without agreement")
    window: Literal["all"] | int = Field(2, description="utterances each prompt shows: the last N, or all")
    max_tokens: int = Field(256, ge=1, description="longest utterance, in tokens")
    temperature: float = Field(0.7, gt=0, description="sampling temperature of utterances")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus of utterances")
    completion_max_tokens: int = Field(512, ge=1, description="longest final completion, in tokens")
    completion_temperature: float = Field(0.1, ge=0, description="sampling temperature of the completion; 0 is greedy")
    completion_top_p: float = Field(0.95, gt=0, le=1, description="nucleus of the completion")

    @model_validator(mode="after")
    def _window_is_positive(self) -> DialogueConfig:
        if self.window != "all" and self.window < 1:
            raise ValueError("window must be 'all' or at least 1")
        return self


class RolloutConfig(Section):
    scenarios: int = Field(16, ge=1, description="scenarios a step")
    group_size: int = Field(8, ge=2, description="dialogues per scenario; they are compared with one another")
    ahead: bool = Field(False, description="negotiate the next step's dialogues while this step learns (sglang)")


class EngineConfig(Section):
    kind: Literal["embedded", "sglang"] = Field("embedded", description="who generates: this process, or SGLang")
    max_running: int = Field(64, ge=1, description="requests that decode together")
    cache_tokens: int = Field(32768, ge=1, description="tokens whose keys and values fit in the cache")
    prefill_tokens: int = Field(1024, ge=1, description="most prompt tokens in one forward pass")
    urls: list[str] = Field(
        [],
        description="sglang: servers that run, or a router, which is asked once, at the start, for its workers; empty: "
        "the trainer starts its own",
    )
    python: Path = Field(Path(".venv-sglang/bin/python"), description="sglang: interpreter of its environment")
    servers: int = Field(1, ge=1, description="sglang: how many the trainer starts")
    gpus: list[int] = Field([], description="sglang: GPUs of those, dealt out evenly; empty: the trainer's own GPU")
    sync: Literal["auto", "tensor", "distributed", "disk"] = Field(
        "auto", description="sglang: how weights get there; auto takes the fastest that fits"
    )
    sync_folder: Path = Field(Path("/tmp"), description="sglang: for sync disk, a folder that the servers see as well")
    request_timeout_s: float = Field(600.0, gt=0, description="sglang: longest wait for one answer, seconds")
    recovery_timeout_s: float = Field(
        300.0, gt=0, description="sglang: longest wait for a server to start or come back"
    )

    @model_validator(mode="after")
    def _servers_have_gpus(self) -> EngineConfig:
        if len(self.gpus) % self.servers:
            raise ValueError(f"{len(self.gpus)} gpus cannot be dealt out evenly to {self.servers} servers")
        return self


class EndpointConfig(Section):
    url: str | None = Field(None, description="openai: base URL of the endpoint, up to and with /v1")
    name: str | None = Field(None, description="openai: model to ask for")
    api_key_env: str = Field("OPENAI_API_KEY", description="openai: environment variable that holds the key")
    timeout_s: float = Field(60.0, gt=0, description="openai: longest wait for one answer, seconds")
    retries: int = Field(5, ge=0, description="openai: further tries after a time-out, 429, 5xx or unreadable answer")
    concurrency: int = Field(32, ge=1, description="openai: requests under way at once")
    requests_per_minute: int | None = Field(None, ge=1, description="openai: limit of each process; none if left out")
    tokens_per_minute: int | None = Field(None, ge=1, description="openai: limit of each process; none if left out")
    hedge: bool = Field(True, description="openai: ask a second time when an answer takes far longer than most")
    max_calls: int | None = Field(None, ge=1, description="openai: budget of the run, in requests")
    max_tokens: int | None = Field(None, ge=1, description="openai: budget of the run, in tokens read and written")
    max_cost: float | None = Field(None, gt=0, description="openai: budget of the run, in the currency of the prices")
    prompt_price: float = Field(0.0, ge=0, description="openai: price of a million tokens read")
    completion_price: float = Field(0.0, ge=0, description="openai: price of a million tokens written")
    cache: Path | None = Field(
        None, description="openai: file of all answers, which are not asked for again; the run's own when left out"
    )
    replay: bool = Field(False, description="openai: take every answer from the cache, and ask nobody")

    @model_validator(mode="after")
    def _money_has_prices(self) -> Self:
        if self.max_cost and not (self.prompt_price or self.completion_price):
            raise ValueError("max_cost needs prompt_price and completion_price")
        if self.replay and not self.cache:
            raise ValueError("replay needs the cache that holds the answers")
        return self


class JudgeConfig(EndpointConfig):
    agreement: str = Field("local", description="local, openai, or module:function")
    reward: str = Field("local", description="local, openai, module:function, or self: the policy as it is")
    evaluation: str = Field("local", description="who compares in negotiator.evaluate: likewise")
    agree_threshold: float = Field(
        0.5, gt=0, lt=1, description="local judge: P(yes) from which a round counts as agreed"
    )
    agreement_name: str | None = Field(None, description="openai: another model than judge.name for agreement")
    reward_name: str | None = Field(None, description="openai: another model than judge.name for the reward")
    evaluation_name: str | None = Field(None, description="openai: another model than judge.name for comparisons")
    temperature: float = Field(0.0, ge=0, description="openai: sampling temperature of verdicts")
    votes: int = Field(1, ge=1, description="openai: verdicts that are asked for, each with a seed of its own")
    vote: Literal["mean", "median"] = Field("mean", description="openai: what becomes of several scores")
    max_failed: float = Field(
        0.5, ge=0, le=1, description="share of a step's dialogues that may fail before the run stops"
    )

    @model_validator(mode="after")
    def _judges_are_complete(self) -> Self:
        kinds = {role: getattr(self, role) for role in ("agreement", "reward", "evaluation")}
        for role, kind in kinds.items():
            if kind not in ("local", "openai") and ":" not in kind and (role, kind) != ("reward", "self"):
                raise ValueError(f"{role} must be local, openai or module:function, not {kind!r}")
        if "openai" in kinds.values():
            if not self.url:
                raise ValueError("an openai judge needs judge.url")
            unnamed = [role for role, kind in kinds.items() if kind == "openai" and not getattr(self, f"{role}_name")]
            if unnamed and not self.name:
                raise ValueError(f"an openai judge needs judge.name, or judge.{unnamed[0]}_name")
        if self.votes > 1 and not self.temperature:
            raise ValueError("votes at temperature 0 are all alike: raise judge.temperature or leave votes at 1")
        return self


class LossConfig(Section):
    type: Literal["dapo", "grpo", "dr_grpo", "cispo", "gspo"] = Field("dapo", description="loss and its normalisation")
    clip_low: float = Field(0.2, ge=0, description="ratio may fall this far below 1")
    clip_high: float = Field(0.2, ge=0, description="ratio may rise this far above 1")
    beta: float = Field(0.0, ge=0, description="weight of the KL divergence from the initial policy")
    entropy_coef: float = Field(0.0, ge=0, description="weight of the entropy bonus")
    importance: Literal["none", "truncate", "mask"] = Field(
        "truncate", description="correction for the gap between the engine's and the trainer's probabilities"
    )
    importance_cap: float = Field(2.0, ge=1, description="bound of that correction")
    train_roles: Literal["both", "agent1"] = Field("both", description="whose utterances are trained")


class OptimizerConfig(Section):
    lr: float = Field(5e-6, gt=0, description="peak learning rate")
    warmup_steps: int = Field(10, ge=0, description="steps of linear warm-up; constant afterwards")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    betas: tuple[float, float] = Field((0.9, 0.95), description="Adam moments")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient norm above which it is scaled down")
    updates: int = Field(1, ge=1, description="optimizer steps on the dialogues of one rollout")
    micro_batch_tokens: int = Field(8192, ge=1, description="most packed tokens in one forward and backward pass")
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations that the backward pass computes again instead of keeping them: none, all but matrix "
        "products and attention, or whole layers",
    )
    liger: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Liger's kernels between the matrix products; auto: on a GPU where liger-kernel is installed",
    )


class LoRAConfig(Section):
    rank: int = Field(0, ge=0, description="rank of adapters on all linear layers; 0: all weights are trained")
    alpha: int = Field(32, ge=1, description="adapters are scaled by alpha / rank")
    quantize: bool = Field(False, description="hold the frozen base in 4 bits (QLoRA, NF4 with double quantization)")

    @model_validator(mode="after")
    def _only_a_frozen_base_is_quantized(self) -> LoRAConfig:
        if self.quantize and not self.rank:
            raise ValueError("quantize needs adapters: set lora.rank")
        return self


class ParallelConfig(Section):
    replicas: int = Field(1, ge=1, description="groups of processes that hold a whole copy of the weights each (HSDP)")
    offload: bool = Field(False, description="keep sharded weights and optimizer in the CPU's memory")
    timeout_s: float = Field(1800.0, gt=0, description="longest wait of a process for the others, seconds")


class EvaluationConfig(Section):
    every: int = Field(0, ge=0, description="steps between evaluations on held-out dilemmas; 0: none")
    scenarios: int = Field(16, ge=1, description="held-out scenarios of an evaluation, one dialogue each")
    metric: Literal["reward", "agreement", "rounds"] = Field(
        "reward", description="figure of an evaluation by which the best checkpoint is kept"
    )


class CheckpointConfig(Section):
    every: int = Field(10, ge=1, description="steps between checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints kept, besides the best")


class Config(Section):
    name: str | None = Field(None, description="name of the run folder under runs/; date and time when left out")
    runs: Path = Field(Path("runs"), description="folder of all runs")
    steps: int = Field(1900, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="the only source of randomness")
    mode: Literal["negotiate", "single"] = Field(
        "negotiate", description="two personas talk it over, or the policy answers alone, in one utterance (baseline)"
    )
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    dialogue: DialogueConfig = DialogueConfig()
    rollout: RolloutConfig = RolloutConfig()
    engine: EngineConfig = EngineConfig()
    judge: JudgeConfig = JudgeConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAConfig = LoRAConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="after")
    def _ahead_is_possible(self) -> Config:
        if self.rollout.ahead:
            if self.engine.kind != "sglang" or "local" in (self.judge.agreement, self.judge.reward):
                raise ValueError(
                    "rollout.ahead needs engine.kind sglang and judges that are not local: what computes in this "
                    "process cannot do so while it learns"
                )
            if self.loss.importance == "none":
                raise ValueError("rollout.ahead trains on dialogues of older weights: set loss.importance to truncate")
        return self


def load_config(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Builds the configuration from a YAML file and `{"section.key": value}` overrides; ValueError in one sentence."""
    values = _read_yaml(path) if path else {}
    for dotted, value in overrides.items():
        *sections, key = dotted.split(".")
        node = values
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: {section} must hold keys, not {node!r}")
        node[key] = value
    try:
        return Config.model_validate(values)
    except ValidationError as error:  # pydantic reports every error over several lines; users get the first, in one
        raise ValueError(_one_sentence(error)) from None


def dump_config(config: Config) -> str:
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--section.key` for every field, one help group a section, with its description and default."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for dotted, field in _leaves(Config):
        section = dotted.rpartition(".")[0] or "run"
        if section not in groups:
            groups[section] = parser.add_argument_group(section)
        groups[section].add_argument(
            f"--{dotted}",
            metavar=_kind(field.annotation),
            default=argparse.SUPPRESS,
            type=yaml.safe_load,
            help=f"{field.description} (default: {field.default})".replace("%", "%%"),
        )


def _kind(annotation: Any) -> str:
    """How the help names the values a field takes: `int`, `auto|cpu|cuda`, `all|int`."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_kind(member) for member in get_args(annotation) if member is not type(None))
    if get_origin(annotation) is tuple:
        return "[" + ",".join(_kind(member) for member in get_args(annotation)) + "]"
    return "path" if annotation is Path else str(annotation.__name__)


class OneSentenceParser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one sentence and exit code 2, and never guesses abbreviations."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def config_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The `--section.key` values that were given, without the other arguments of the command."""
    names = {dotted for dotted, _ in _leaves(Config)}
    return {key: value for key, value in vars(arguments).items() if key in names}


def _leaves(section: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            leaves += _leaves(field.annotation, f"{prefix}{name}.")
        else:
            leaves.append((prefix + name, field))
    return leaves


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"no config file at {path}")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values")
    return values


def _one_sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("literal['all']", "int"))
    if first["type"] == "extra_forbidden":
        return f"unknown key {where}; --help lists all keys"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, not {first['input']!r}"
