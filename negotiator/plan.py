"""What a run will take, computed before anything is loaded: tokens and arithmetic of a step, memory of a process.

All are upper bounds: every dialogue goes on to its last round, and every text is as long as it may be.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import psutil
import torch
from transformers import PretrainedConfig

from negotiator.config import Config
from negotiator.dialogue import AGENTS
from negotiator.engines.weight_sync import BUCKET_BYTES
from negotiator.flops import Model, Work, linear_layers, without_weights
from negotiator.parallel import decoder_layers
from negotiator_kernels.availability import native_off_reason
from negotiator_kernels.fused import CHUNK_BYTES

GIB = 2**30

# Dense bf16 operations a second that an H100 and an H200 are sold with, and the share of them that the learner reached
# on one H200 with the shape of Qwen3-4B: benchmarks/results/learner-bar-nvidia-h200.csv.
STATED_RATE = 989e12
MEASURED_MFU = 0.42

# Python, torch and transformers: 0.4 GiB once imported; 0.2 more is what the quickstart's peak had beyond the plan.
LIBRARY_BYTES = GIB * 6 // 10

# NF4 with double quantization: half a byte, for 64 parameters a scale of one byte, for 256 scales one of four.
BYTES_IN_4_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Longest prompts of the run's data, in tokens, without the dialogue they quote."""

    utterance_prompt: int
    utterance_prefix: int  # what all prompts of an agent in a scenario have in common
    completion_prompt: int
    judge_prompt: int  # the longest of both local judges; 0 without one


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run computes."""

    device: torch.device
    dtype: torch.dtype
    processes: int = 1
    available: int | None = None  # bytes for each process; None: the machine is not at hand


@dataclass(frozen=True, slots=True)
class Plan:
    """Upper bounds for one step. Memory of each process, in bytes."""

    place: Place
    utterances: int
    generated_tokens: int
    learned_tokens: int
    longest_sequence: int
    operations: dict[str, int]  # of all processes together
    memory: dict[str, int]  # of the device
    host_memory: int  # the CPU's, where the device is a GPU

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    def learner_seconds(self, mfu: float) -> float | None:
        """Of a step at `mfu` of STATED_RATE; None where that rate says nothing."""
        if self.place.device.type != "cuda" or self.place.dtype != torch.bfloat16:
            return None
        return self.operations["learner"] / self.place.processes / (mfu * STATED_RATE)

    def require_room(self) -> None:
        """Raises ValueError, saying what to change, where the run needs more memory than there is."""
        if self.place.available is not None and self.needed > self.place.available:
            raise ValueError(
                f"the run needs about {self.needed / GIB:.1f} GiB but {self.place.available / GIB:.1f} GiB are "
                "available: lower optimizer.micro_batch_tokens or engine.cache_tokens, set optimizer.recompute, use "
                "more processes, or take a smaller model"
            )

    def text(self, mfu: float) -> str:
        available = self.place.available
        room = "" if available is None else f" of {available / GIB:.2f} GiB available"
        seconds = self.learner_seconds(mfu)
        source = ", as measured on one H200" if mfu == MEASURED_MFU else ""
        lines = [
            "plan (upper bounds)",
            f"  utterances a step              {self.utterances:>12,}",
            f"  generated tokens a step        {self.generated_tokens:>12,}",
            f"  tokens the learner computes    {self.learned_tokens:>12,}",
            f"  longest sequence, tokens       {self.longest_sequence:>12,}",
            *(f"  {f'TFLOP a step, {who}':<30} {count / 1e12:>12,.1f}" for who, count in self.operations.items()),
        ]
        if seconds is not None:
            rate = f"{mfu:.0%} of {STATED_RATE / 1e12:.0f} TFLOP/s{source}"
            lines.append(f"  {'seconds a step, learner':<30} {seconds:>12,.1f} at {rate}")
        lines += [
            f"  memory of each of {self.place.processes} process(es), on {self.place.device.type}",
            *(f"    {name:<34} {size / GIB:>8.2f} GiB" for name, size in self.memory.items()),
            f"    {'memory in all':<34} {self.needed / GIB:>8.2f} GiB{room}",
        ]
        if self.host_memory:
            lines.append(f"    {'besides, of the CPU':<34} {self.host_memory / GIB:>8.2f} GiB")
        return "\n".join(lines)


def available_memory(device: torch.device) -> int:
    """For this process: a GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


class Sizes(NamedTuple):
    """Of a model, as its configuration says."""

    parameters: int
    matrices: int  # parameters of the linear layers, without the output embedding
    sides: int  # inputs and outputs of those, added up: an adapter of rank r has r parameters for each
    layers: int
    layer: int  # parameters of a decoder layer
    hidden: int
    queries: int  # width of all heads
    keys: int  # width of all key heads, and of all value heads
    heads: int
    inner: int  # width of the gated MLP
    vocabulary: int
    normed_heads: bool  # queries and keys pass through norms of their own

    @classmethod
    def of(cls, config: PretrainedConfig) -> Sizes:
        model = without_weights(config)
        linear = linear_layers(model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            parameters=model.num_parameters(),
            matrices=sum(layer.weight.numel() for layer in linear),
            sides=sum(layer.in_features + layer.out_features for layer in linear),
            layers=config.num_hidden_layers,
            layer=max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
            hidden=config.hidden_size,
            queries=config.num_attention_heads * head_dim,
            keys=config.num_key_value_heads * head_dim,
            heads=config.num_attention_heads,
            inner=config.intermediate_size,
            vocabulary=config.vocab_size,
            normed_heads=any(name.endswith("q_norm.weight") for name, _ in model.named_parameters()),
        )


def make_plan(config: Config, model: PretrainedConfig, lengths: Lengths, place: Place) -> Plan:
    """Raises ValueError, naming what to change, where the run cannot fit the context, the cache or the processes."""
    dialogue = config.dialogue
    alone = config.mode == "single"
    agents = 1 if alone else len(AGENTS)
    most_utterances = 1 if alone else len(AGENTS) * dialogue.max_rounds
    window = most_utterances if dialogue.window == "all" else dialogue.window
    # An utterance quoted in a prompt is tokenised again next to a speaker's name: allow a little more than it had.
    quoted = dialogue.max_tokens + 16
    added = [
        lengths.utterance_prompt - lengths.utterance_prefix + min(turn, window) * quoted + dialogue.max_tokens
        for turn in range(most_utterances)
    ]
    utterance_sequence = lengths.utterance_prefix + max(added)
    completion_tokens = 0 if alone else dialogue.completion_max_tokens  # a text of its own
    completion_sequence = lengths.completion_prompt + most_utterances * quoted + completion_tokens
    judge_sequence = lengths.judge_prompt + max(most_utterances * quoted, completion_tokens)
    longest = max(utterance_sequence, completion_sequence, judge_sequence if lengths.judge_prompt else 0)

    context = model.max_position_embeddings
    if longest > context:
        raise ValueError(
            f"a dialogue can take {longest:,} tokens but the model's context is {context:,}: "
            "lower dialogue.max_tokens, dialogue.max_rounds or dialogue.completion_max_tokens"
        )
    if longest > config.engine.cache_tokens:
        raise ValueError(
            f"a dialogue can take {longest:,} tokens: raise engine.cache_tokens from {config.engine.cache_tokens:,}"
        )

    scenarios, dialogues = config.rollout.scenarios, config.rollout.scenarios * config.rollout.group_size
    trained = added if config.loss.train_roles == "both" else added[:: len(AGENTS)]
    speakers = agents if config.loss.train_roles == "both" else 1
    learned = _work(scenarios * speakers, lengths.utterance_prefix, dialogues, trained, dialogue.max_tokens)
    spoken = _work(scenarios * agents, lengths.utterance_prefix, dialogues, added, dialogue.max_tokens)
    completed = _work(0, 0, 0 if alone else dialogues, [completion_sequence], completion_tokens)
    arithmetic, sizes = Model.of(model), Sizes.of(model)
    operations = {
        "learner": _learner_operations(config, arithmetic, sizes, learned),
        "rollout": arithmetic.forward(spoken) + arithmetic.forward(completed),
    }
    if lengths.judge_prompt:
        judged = _work(0, 0, dialogues, [judge_sequence] * (1 if alone else dialogue.max_rounds + 1), 1)
        operations["local judge"] = arithmetic.forward(judged)

    pass_tokens = min(max(config.optimizer.micro_batch_tokens, utterance_sequence), learned.tokens)
    one_pass = learned.tokens <= config.optimizer.micro_batch_tokens
    memory, host_memory = learner_memory(config, sizes, place, pass_tokens, one_pass)
    memory |= _generation_memory(config, sizes, place, "local" in (config.judge.agreement, config.judge.reward))
    return Plan(
        place=place,
        utterances=dialogues * most_utterances,
        generated_tokens=spoken.trained + completed.trained,
        learned_tokens=learned.tokens,
        longest_sequence=longest,
        operations=operations,
        memory={name: count for name, count in memory.items() if count},
        host_memory=host_memory,
    )


def _work(prefixes: int, prefix: int, dialogues: int, added: Sequence[int], rows: int) -> Work:
    """Of `prefixes` prefixes, and of what each text of a dialogue adds to its own; `rows` logits for each of those."""
    return Work(
        tokens=prefixes * prefix + dialogues * sum(added),
        trained=dialogues * len(added) * rows,
        pairs=prefixes * prefix * (prefix + 1) // 2 + dialogues * sum(n * prefix + n * (n + 1) // 2 for n in added),
    )


def _learner_operations(config: Config, model: Model, sizes: Sizes, work: Work) -> int:
    """Of all that is computed, a second time included."""
    forward, updates, rank = model.forward(work), config.optimizer.updates, config.lora.rank
    once = model.flop(work)
    if rank:  # the frozen weights get no gradient, the adapters do
        once = 2 * forward + 4 * model.attention * work.pairs + 6 * rank * sizes.sides * work.tokens
    again = forward if config.optimizer.recompute == "full" else 0
    return updates * (once + again) + (forward if config.loss.beta else 0)


def learner_memory(
    config: Config, sizes: Sizes, place: Place, pass_tokens: int, one_pass: bool
) -> tuple[dict[str, int], int]:
    """(the device's by what it is for, the CPU's). `one_pass`: there is a single one in an update."""
    size, rank, optimizer = place.dtype.itemsize, config.lora.rank, config.optimizer
    on_gpu = place.device.type == "cuda"
    sharded = place.processes > 1 and not rank
    if sharded and place.processes % config.parallel.replicas:
        raise ValueError(
            f"{place.processes} processes cannot hold {config.parallel.replicas} replicas of equal size: "
            "parallel.replicas must divide their number"
        )
    shards = place.processes // config.parallel.replicas if sharded else 1
    frozen = sizes.parameters * size if rank else 0
    if config.lora.quantize:
        frozen = int(sizes.matrices * BYTES_IN_4_BITS) + (sizes.parameters - sizes.matrices) * size
    trained = rank * sizes.sides if rank else sizes.parameters
    copied = config.loss.beta > 0 and not rank
    head = sizes.vocabulary * sizes.hidden
    outside = sizes.parameters - sizes.layers * sizes.layer  # embeddings and the last norm
    # FSDP2 gathers the next layer during a layer's pass and holds both until it has copied them out. In the backward
    # pass there are its gradients besides, and what is summed up in fp32. What is outside of layers stays gathered.
    gathered = sizes.layer * (3 * size + size + 4) + outside * size * (1 + copied)
    gradients = trained * 4 // shards
    held = {
        "fp32 master weights": trained * 4 // shards if size < 4 or sharded else 0,
        "fp32 gradients": gradients,
        "Adam moments": trained * 8 // shards,
        "reference model": sizes.parameters * (4 if sharded else size) // shards if copied else 0,
    }
    activations = activation_bytes(sizes, place, optimizer.recompute, optimizer.liger, rank, pass_tokens)
    saved = trained * 12 // shards + (0 if rank else sizes.parameters * size)  # and the exported model
    offloaded = sharded and config.parallel.offload and on_gpu
    memory = {
        "frozen weights" if rank else "weights": frozen + trained * size * (not sharded),
        **({} if offloaded else held),
        "layers gathered from the others": gathered if sharded else 0,
        "logits, lm_head's gradient": CHUNK_BYTES[place.device.type] + (0 if rank else head * (4 + size)),
        "checkpoint being written": 0 if on_gpu else saved,
        "Python and its libraries": 0 if on_gpu else LIBRARY_BYTES,
    }
    if one_pass and not offloaded:  # gradients come as activations go
        memory["activations, beyond the gradients"] = max(0, activations - gradients)
    else:
        memory["activations"] = activations
    return memory, (saved + LIBRARY_BYTES if on_gpu else 0) + (sum(held.values()) if offloaded else 0)


def activation_bytes(
    sizes: Sizes,
    place: Place,
    recompute: Literal["none", "selective", "full"],
    liger: Literal["auto", "on", "off"],
    rank: int,
    tokens: int,
) -> int:
    """What a pass over `tokens` keeps for its backward pass."""
    size, hidden, queries, keys, inner = place.dtype.itemsize, sizes.hidden, sizes.queries, sizes.keys, sizes.inner
    native = place.device.type == "cpu" and place.dtype == torch.float32 and native_off_reason() is None
    on_gpu = liger != "off" and place.device.type == "cuda" and importlib.util.find_spec("liger_kernel") is not None
    kernels = native or on_gpu
    parts = 1 if native else 2  # of attention
    norms = 2 * hidden + (queries + keys) * sizes.normed_heads
    # Norms keep their input; without such kernels in fp32, and for their weights' gradient the normed input besides.
    # Projections keep their input, attention its queries, keys, values and output, the MLP the factors of its product
    # and, without those kernels, the activation function's result.
    whole = norms * (size if kernels else 4 + (0 if rank else size)) + size * 7 * rank
    whole += size * (2 * hidden + 2 * queries + 2 * keys + (3 if kernels else 4) * inner) + 4 * sizes.heads
    products = queries + 2 * keys + 2 * hidden + 2 * inner
    kept = {
        "none": whole,
        # A layer's input, the result of each matrix product, also of an adapter's, and the parts of attention.
        "selective": size * (hidden + products * (1 + (rank > 0)) + 7 * rank)
        + parts * (size * queries + 4 * sizes.heads),
        "full": size * hidden,
    }[recompute]
    once = whole if recompute != "none" else 0  # a layer's, when they are computed again
    outside = 16 * hidden  # the last norm, and the hidden states with their gradient
    return tokens * (sizes.layers * kept + once + outside)


def _generation_memory(config: Config, sizes: Sizes, place: Place, local_judge: bool) -> dict[str, int]:
    """Of what speaks and judges."""
    size, engine, on_gpu = place.dtype.itemsize, config.engine, place.device.type == "cuda"
    embedded = engine.kind == "embedded"
    apart = config.lora.rank > 0 or place.processes > 1  # see setup.prepare
    weights = sizes.parameters * size
    cache = 2 * sizes.layers * sizes.keys * size * engine.cache_tokens
    # SGLang servers that share this memory: on a CPU, or on the trainer's own GPU.
    servers = 0 if embedded or engine.urls or engine.gpus else engine.servers
    tokens = engine.prefill_tokens + engine.max_running
    buffers = tokens * (4 * sizes.queries + 2 * size * (2 * sizes.hidden + 2 * sizes.queries + 2 * sizes.inner))
    buffers += 3 * 4 * engine.max_running * sizes.vocabulary
    return {
        "engine's own copy of the weights": weights * apart,
        "judge's weights": weights * local_judge,
        # See engines.native_forward and negotiator_kernels.linear.
        "weights repacked for decoding": 0 if on_gpu else weights * (embedded + local_judge),
        "key-value cache": cache * (embedded + local_judge),
        "engine's buffers": buffers * (embedded + local_judge) if on_gpu else 0,
        "SGLang servers": servers * (weights + cache),
        "weights on their way to SGLang": 0 if embedded else BUCKET_BYTES[place.device.type],
    }
