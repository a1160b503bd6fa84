"""The learner: packed turn samples -> hidden states -> masked GRPO loss -> one AdamW step on fp32 master weights.

Shapes: T = packed tokens of a micro-batch, D = hidden size, V = vocabulary.

Left out here: sharding, activation checkpointing, LoRA, several steps per rollout.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from negotiator.attention import PackedLayout, use_negotiator_attention
from negotiator.config import LossConfig, OptimizerConfig
from negotiator.loss import GRPOLoss, grpo_loss
from negotiator.types import PackedBatch


@dataclass(frozen=True, slots=True)
class LearnerStats:
    """One optimizer step. `logprob_gap` is mean |trainer log-prob - sampling log-prob| over the tokens it computed."""

    loss: float
    grad_norm: float
    learning_rate: float
    logprob_gap: float
    entropy: float
    computed_tokens: int
    logical_tokens: int
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float


@dataclass(slots=True)
class _Sums:
    """Over the micro-batches of a step; gap and entropy are sums over trained tokens."""

    loss: float = 0.0
    gap: float = 0.0
    entropy: float = 0.0
    tokens: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0


class Learner:
    """Owns the master weights and the optimizer of `model`, whose parameters hold the compute precision.

    Gradients of every micro-batch are added up in fp32 on the masters, so bf16 compute loses nothing between
    micro-batches. In fp32 the parameters are their own masters.
    """

    def __init__(
        self, model: PreTrainedModel, optimizer: OptimizerConfig, loss: LossConfig, temperature: float
    ) -> None:
        use_negotiator_attention(model)
        self.model = model
        self.config = optimizer
        self.loss_config = loss
        self.temperature = temperature
        self.masters: dict[str, nn.Parameter] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in model.named_parameters()
        }
        for name, parameter in model.named_parameters():
            if parameter is not self.masters[name]:
                parameter.register_post_accumulate_grad_hook(_add_gradient_to(self.masters[name]))
        self.optimizer = torch.optim.AdamW(
            self.masters.values(), lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay
        )

    def step(self, step: int, batches: Sequence[PackedBatch], denominator: float) -> LearnerStats:
        """Step `step` (from 0) over `batches`, the sum of their losses divided by `denominator`.

        Without batches (no group told its dialogues apart) the weights and the optimizer stay as they are.
        Raises RuntimeError for a gradient that is not finite.
        """
        learning_rate = self.config.lr * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        sums = self.accumulate(batches, denominator)
        started = time.perf_counter()
        grad_norm = self._update(learning_rate) if batches else 0.0
        return LearnerStats(
            loss=sums.loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            logprob_gap=sums.gap / max(1, sums.tokens),
            entropy=sums.entropy / max(1, sums.tokens),
            computed_tokens=sum(len(batch.input_ids) for batch in batches),
            logical_tokens=sum(batch.logical_tokens for batch in batches),
            forward_seconds=sums.forward_seconds,
            backward_seconds=sums.backward_seconds,
            optimizer_seconds=time.perf_counter() - started,
        )

    def accumulate(self, batches: Sequence[PackedBatch], denominator: float) -> _Sums:
        """Adds the gradients of `batches` to the masters' and returns what was seen on the way."""
        sums = _Sums()
        for batch in batches:
            started = time.perf_counter()
            result = self._loss(batch, denominator)
            forward_done = time.perf_counter()
            result.loss.backward()
            mask = batch.mask.to(result.logprobs.device)
            gaps = result.logprobs - batch.sampling_logprobs.to(mask.device)
            # Reading the scalars waits for the device, so the seconds are honest on a GPU too.
            sums.loss += result.loss.item()
            sums.gap += gaps[mask].abs().sum().item()
            sums.entropy += result.entropy[mask].sum().item()
            sums.tokens += int(batch.mask.sum())
            sums.forward_seconds += forward_done - started
            sums.backward_seconds += time.perf_counter() - forward_done
        return sums

    def _loss(self, batch: PackedBatch, denominator: float) -> GRPOLoss:
        device = self.model.device
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids.to(device)[None],
            position_ids=batch.position_ids.to(device)[None],
            use_cache=False,
            layout=PackedLayout(batch.segments),
        ).last_hidden_state[0]  # [T, D]
        return grpo_loss(
            hidden,
            self.model.get_output_embeddings().weight,
            batch.targets.to(device),
            batch.advantages.to(device),
            batch.mask.to(device),
            sampling_logprobs=batch.sampling_logprobs.to(device),
            sequence_ids=batch.sequence_ids.to(device),
            temperature=self.temperature,
            loss_type=self.loss_config.type,
            clip_low=self.loss_config.clip_low,
            clip_high=self.loss_config.clip_high,
            entropy_coef=self.loss_config.entropy_coef,
            importance=self.loss_config.importance,
            importance_cap=self.loss_config.importance_cap,
            denominator=denominator,
        )

    def _update(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = nn.utils.clip_grad_norm_(self.masters.values(), self.config.max_grad_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter is not self.masters[name]:
                    parameter.copy_(self.masters[name])
        return norm.item()


def _add_gradient_to(master: nn.Parameter) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad += gradient
        parameter.grad = None

    return hook
