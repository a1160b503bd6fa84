"""What a run will take, computed before anything is loaded: tokens a step, and memory."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch
from transformers import PretrainedConfig

from negotiator.config import Config

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Lengths:
    """Longest prompts of the run's data, in tokens, without the dialogue they quote."""

    utterance_prompt: int
    completion_prompt: int
    judge_prompt: int  # the longest of both local judges; 0 without one


@dataclass(frozen=True, slots=True)
class Plan:
    """Upper bounds for one step. Memory in bytes."""

    utterances: int
    generated_tokens: int
    longest_sequence: int
    memory: dict[str, int]
    available: int

    @property
    def needed(self) -> int:
        return sum(self.memory.values())

    def __str__(self) -> str:
        lines = [
            "plan (upper bounds)",
            f"  utterances a step              {self.utterances:>12,}",
            f"  generated tokens a step        {self.generated_tokens:>12,}",
            f"  longest sequence, tokens       {self.longest_sequence:>12,}",
            *(f"  {name:<30} {size / GIB:>8.2f} GiB" for name, size in self.memory.items()),
            f"  {'memory in all':<30} {self.needed / GIB:>8.2f} GiB of {self.available / GIB:.2f} GiB available",
        ]
        return "\n".join(lines)


def make_plan(
    config: Config, model: PretrainedConfig, parameters: int, lengths: Lengths, device: torch.device, dtype: torch.dtype
) -> Plan:
    """Raises ValueError, naming what to change, where the run cannot fit the context, the cache or the memory."""
    dialogue, size = config.dialogue, dtype.itemsize
    most_utterances = 2 * dialogue.max_rounds
    shown = most_utterances - 1 if dialogue.window == "all" else min(dialogue.window, most_utterances - 1)
    # An utterance quoted in a prompt is tokenised again next to a speaker's name: allow a little more than it had.
    quoted = dialogue.max_tokens + 16
    training_sequence = lengths.utterance_prompt + shown * quoted + dialogue.max_tokens
    completion_sequence = lengths.completion_prompt + most_utterances * quoted + dialogue.completion_max_tokens
    judge_sequence = lengths.judge_prompt + max(most_utterances * quoted, dialogue.completion_max_tokens)
    longest = max(training_sequence, completion_sequence, judge_sequence if lengths.judge_prompt else 0)

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

    local_judge = lengths.judge_prompt > 0
    packed = device.type == "cpu"  # see engines.native_forward and negotiator_kernels.linear
    embedded = config.engine.kind == "embedded"
    # SGLang servers that share this memory: on a CPU, or on the trainer's own GPU.
    servers = 0 if embedded or config.engine.urls or config.engine.gpus else config.engine.servers
    hidden, layers = model.hidden_size, model.num_hidden_layers
    head_dim = getattr(model, "head_dim", None) or hidden // model.num_attention_heads
    kv_width = model.num_key_value_heads * head_dim
    cache = 2 * layers * kv_width * size * config.engine.cache_tokens
    batch_tokens = max(config.optimizer.micro_batch_tokens, training_sequence)
    # Kept for backward per token and layer: the inputs of the projections, norms and the gated MLP's four products.
    activations = layers * (9 * hidden + 2 * kv_width + 4 * model.intermediate_size) * size
    memory = {
        "weights": parameters * size,
        "fp32 master weights": parameters * 4 if size < 4 else 0,
        "fp32 gradients": parameters * 4,
        "Adam moments": parameters * 8,
        "judge's weights": parameters * size if local_judge else 0,
        "weights repacked for decoding": parameters * size * (embedded + local_judge) if packed else 0,
        "key-value cache": cache * (embedded + local_judge),
        "SGLang servers": servers * (parameters * size + cache),
        "activations": batch_tokens * activations,
        "lm_head gradient and logits": model.vocab_size * hidden * 8 + 2**28,
    }
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    plan = Plan(
        utterances=config.rollout.scenarios * config.rollout.group_size * most_utterances,
        generated_tokens=config.rollout.scenarios
        * config.rollout.group_size
        * (most_utterances * dialogue.max_tokens + dialogue.completion_max_tokens),
        longest_sequence=longest,
        memory={name: count for name, count in memory.items() if count},
        available=available,
    )
    if plan.needed > available:
        raise ValueError(
            f"the run needs about {plan.needed / GIB:.1f} GiB but {available / GIB:.1f} GiB are available: "
            "lower optimizer.micro_batch_tokens or engine.cache_tokens, or take a smaller model"
        )
    return plan
