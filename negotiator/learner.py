"""The learner: packed turn samples -> hidden states -> masked GRPO loss -> one AdamW step on fp32 master weights.

Shapes: T = packed tokens of a micro-batch, D = hidden size, V = vocabulary.

Several updates on the dialogues of one rollout take their old log-probs from the first one's own pass. Reference
log-probs, for a KL term, are those of the initial policy: the model without its adapters, or a frozen copy.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from negotiator import lora, parallel
from negotiator.attention import PackedLayout, use_negotiator_attention
from negotiator.config import LossConfig, OptimizerConfig
from negotiator.liger import use_liger
from negotiator.lora import MergedTensors
from negotiator.loss import grpo_loss, token_logprobs
from negotiator.native_layers import add_embedding_gradients_in_place, use_native_layers
from negotiator.packing import padding_batch
from negotiator.parallel import ALONE, Sharding, WholeTensors
from negotiator.recompute import recompute
from negotiator.types import PackedBatch


@dataclass(frozen=True, slots=True)
class LearnerStats:
    """One rollout's worth of learning, over all processes; seconds are this process's own.

    `loss`, `grad_norm`, `approx_kl` (from the policy before the first update, nats a token) and `clip_fraction` (of
    trained tokens) are of the last update, the others of the first. `logprob_gap` is mean |trainer log-prob - sampling
    log-prob| over the tokens it computed, `reference_kl` the estimate that beta weighs (0 without it). `updated` is
    False where nothing could be learned: no batches, or a loss or gradient that is not finite.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    logprob_gap: float
    entropy: float
    approx_kl: float
    clip_fraction: float
    reference_kl: float
    updated: bool
    computed_tokens: int
    logical_tokens: int
    forward_seconds: float
    loss_seconds: float
    backward_seconds: float
    optimizer_seconds: float


@dataclass(slots=True)
class _Sums:
    """Over the micro-batches of an update; all from `gap` to `reference_kl` are sums over trained tokens."""

    loss: float = 0.0
    gap: float = 0.0
    entropy: float = 0.0
    approx_kl: float = 0.0
    clipped: float = 0.0
    reference_kl: float = 0.0
    tokens: float = 0.0
    forward_seconds: float = 0.0
    loss_seconds: float = 0.0
    backward_seconds: float = 0.0


@dataclass(slots=True)
class Pass:
    """A micro-batch of this process, and log-probs [T] that are the same in every update."""

    batch: PackedBatch
    reference: torch.Tensor | None  # of the initial policy; None where nothing weighs them
    old: torch.Tensor | None = None  # of the policy before the first update, which finds them


class Policy(nn.Module):
    """A causal LM with the loss on top.

    Both are one module, so that a sharded output embedding is whole while the loss uses it, and its gradient is reduced
    like any other.
    """

    def __init__(self, model: PreTrainedModel, loss: LossConfig, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self._temperature = temperature
        self.loss_started = 0.0  # when the last forward pass came to the loss

    def forward(
        self,
        batch: PackedBatch,
        denominator: float | None,
        old_logprobs: torch.Tensor | None = None,
        ref_logprobs: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """The loss, log-probs [T], NaN where nothing is trained, and sums of gap, entropy, KL and clipping.

        Without a denominator the log-probs alone, and no gradient.
        """
        device = self.model.device
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids.to(device)[None],
            position_ids=batch.position_ids.to(device)[None],
            use_cache=False,
            layout=PackedLayout(batch.segments),
        ).last_hidden_state[0]  # [T, D]
        weight = self.model.get_output_embeddings().weight
        targets, mask = batch.targets.to(device), batch.mask.to(device)
        if denominator is None:
            return (token_logprobs(hidden, weight, targets, mask, self._temperature)[0],)
        self.loss_started = _now(device)
        result = grpo_loss(
            hidden,
            weight,
            targets,
            batch.advantages.to(device),
            mask,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            sampling_logprobs=batch.sampling_logprobs.to(device),
            sequence_ids=batch.sequence_ids.to(device),
            temperature=self._temperature,
            loss_type=self.loss.type,
            clip_low=self.loss.clip_low,
            clip_high=self.loss.clip_high,
            beta=self.loss.beta,
            entropy_coef=self.loss.entropy_coef,
            importance=self.loss.importance,
            importance_cap=self.loss.importance_cap,
            denominator=denominator,
        )
        gaps = (result.logprobs.detach() - batch.sampling_logprobs.to(device))[mask]
        clipped = result.metrics.clip_fraction_low + result.metrics.clip_fraction_high
        means = (result.metrics.approx_kl, clipped)
        sums = [gaps.abs().sum(), result.entropy[mask].sum(), *(mean.nan_to_num() * len(gaps) for mean in means)]
        return result.loss, result.logprobs, torch.stack([sum_.double() for sum_ in sums])


class Learner:
    """Owns the master weights and the optimizer of `model`.

    One process: the model's parameters hold the compute precision, so that an engine can generate with them, and
    gradients of every micro-batch are added up in fp32 on masters of their own (fp32 parameters are their own). Several
    processes: the parameters are fp32 and sharded, and are themselves the masters (see `parallel.shard`).
    `path` says what computes the layers, in a few words.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: OptimizerConfig,
        loss: LossConfig,
        temperature: float,
        sharding: Sharding | None = None,
        reference: PreTrainedModel | None = None,
    ) -> None:
        """`model`: in the compute precision, or in fp32 where it is to be sharded; LoRA's adapters are in it already.

        `reference`: the initial policy, loaded likewise, where a KL term needs one and there are no adapters.
        """
        computes_in = sharding.dtype if sharding else model.dtype
        self.path = use_liger(model, optimizer.liger)
        if model.device.type == "cpu":  # where Liger has nothing
            self.path = use_native_layers(model, computes_in)
        use_negotiator_attention(model)
        recompute(model, optimizer.recompute)
        if model.dtype == torch.float32 and (sharding is None or sharding.replicate):
            add_embedding_gradients_in_place(model)
        self.model = model
        self.policy = Policy(model, loss, temperature)
        self.config = optimizer
        self.world = sharding.world if sharding else ALONE
        self.adapted = lora.is_adapted(model)
        self._sharding = sharding
        self._reference: Policy | None = None
        if loss.beta and not self.adapted:
            assert reference is not None, "a KL term needs the initial policy"
            use_liger(reference, optimizer.liger)
            if reference.device.type == "cpu":
                use_native_layers(reference, computes_in)
            use_negotiator_attention(reference)
            self._reference = Policy(reference.requires_grad_(False), loss, temperature)
        if sharding and not sharding.replicate:
            assert model.dtype == torch.float32, "masters are sharded, and they are fp32"
            for policy in (self.policy, self._reference):
                if policy is not None:
                    parallel.shard(policy, policy.model, sharding)
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.masters: dict[str, nn.Parameter] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        for name, parameter in self._parameters.items():
            if parameter is not self.masters[name]:
                parameter.register_post_accumulate_grad_hook(_add_gradient_to(self.masters[name]))
        self.optimizer = torch.optim.AdamW(
            self.masters.values(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            weight_decay=optimizer.weight_decay,
            fused=True,  # on two cores 9 times faster than a loop over parameters
        )

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """What the policy computes with: whole tensors under the names of the model, or of the base of its adapters.

        It can be iterated any number of times. Where weights are sharded, all processes have to do so together.
        """
        if self.adapted:
            return MergedTensors(self.model)
        return WholeTensors(list(self.model.named_parameters()))

    def step(self, step: int, batches: Sequence[PackedBatch], denominator: float) -> LearnerStats:
        """Step `step` (from 0) over `batches`, the sum of their losses divided by `denominator`.

        All processes pass the same batches; each computes its share. Without batches (no group told its dialogues
        apart), or with a loss or gradient that is not finite, the weights and the optimizer stay as they are.
        """
        learning_rate = self.config.lr * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        started = _now(self.model.device)
        passes = self.passes(batches)
        reference_seconds = _now(self.model.device) - started
        updates: list[tuple[_Sums, float, bool]] = []
        optimizer_seconds = 0.0
        while batches and len(updates) < self.config.updates and all(updated for *_, updated in updates):
            sums = self.accumulate(passes, denominator)
            started = _now(self.model.device)
            updates.append((sums, *self._update(learning_rate, sums.loss)))
            optimizer_seconds += _now(self.model.device) - started
        first, *_ = updates[0] if updates else (_Sums(),)
        last, grad_norm, updated = updates[-1] if updates else (first, 0.0, False)
        return LearnerStats(
            loss=last.loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            logprob_gap=first.gap / max(1, first.tokens),
            entropy=first.entropy / max(1, first.tokens),
            approx_kl=last.approx_kl / max(1, last.tokens),
            clip_fraction=last.clipped / max(1, last.tokens),
            reference_kl=first.reference_kl / max(1, first.tokens),
            updated=updated,
            computed_tokens=sum(len(batch.input_ids) for batch in batches) * max(1, len(updates)),
            logical_tokens=sum(batch.logical_tokens for batch in batches) * max(1, len(updates)),
            forward_seconds=reference_seconds + sum(sums.forward_seconds for sums, *_ in updates),
            loss_seconds=sum(sums.loss_seconds for sums, *_ in updates),
            backward_seconds=sum(sums.backward_seconds for sums, *_ in updates),
            optimizer_seconds=optimizer_seconds,
        )

    def passes(self, batches: Sequence[PackedBatch]) -> list[Pass]:
        """This process's share of `batches`, which are those of all."""
        own = parallel.own_share(self.world, batches)
        # As many passes as everybody else's, or those who have one more would wait for the others for ever.
        missing = -(-len(batches) // self.world.size) - len(own)
        own += [padding_batch()] * missing
        return [Pass(batch, self._reference_logprobs(batch)) for batch in own]

    def accumulate(self, passes: Sequence[Pass], denominator: float) -> _Sums:
        """Adds the gradients of `passes` to the masters' and returns what was seen on the way, over all processes."""
        sums, device = _Sums(), self.model.device
        for each in passes:
            mask = each.batch.mask.to(device)
            started = _now(device)
            loss, logprobs, seen = self.policy(each.batch, denominator, each.old, each.reference)
            forward_done = _now(device)
            (loss * self.world.size).backward()  # gradients are averaged, and the losses have to add up
            if each.old is None:
                each.old = logprobs.detach()
            sums.loss += loss.item()
            gap, entropy, approx_kl, clipped = seen.tolist()
            sums.gap, sums.entropy = sums.gap + gap, sums.entropy + entropy
            sums.approx_kl, sums.clipped = sums.approx_kl + approx_kl, sums.clipped + clipped
            if each.reference is not None:
                distance = (each.reference - logprobs.detach())[mask]
                sums.reference_kl += (distance.exp() - distance - 1).sum().item()
            sums.tokens += int(each.batch.mask.sum())
            sums.forward_seconds += self.policy.loss_started - started
            sums.loss_seconds += forward_done - self.policy.loss_started
            sums.backward_seconds += _now(device) - forward_done
        started = _now(device)
        names = ("loss", "gap", "entropy", "approx_kl", "clipped", "reference_kl", "tokens")
        totals = parallel.sum_up(self.world, [getattr(sums, name) for name in names])
        if self._sharding and self._sharding.replicate:
            parallel.average(self.world, [master.grad for master in self.masters.values() if master.grad is not None])
        sums.backward_seconds += _now(device) - started  # what is left of it: sharded gradients are averaged within it
        return dataclasses.replace(sums, **dict(zip(names, totals, strict=True)))

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> torch.Tensor | None:
        """Log-probs [T] of the initial policy; None where nothing weighs them."""
        if not self.policy.loss.beta:
            return None
        if self._reference is not None:
            return cast(torch.Tensor, self._reference(batch, None)[0])
        with lora.without_adapters(self.model):
            return cast(torch.Tensor, self.policy(batch, None)[0])

    def _update(self, learning_rate: float, loss: float) -> tuple[float, bool]:
        """The gradient's norm, and whether it was used."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = parallel.full_tensor(nn.utils.get_total_norm(gradients))
        finite = math.isfinite(loss) and math.isfinite(norm.item())
        if finite:
            nn.utils.clip_grads_with_norm_(self.masters.values(), self.config.max_grad_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if finite:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    if parameter is not self.masters[name]:
                        parameter.copy_(self.masters[name])
        return norm.item(), finite


def _now(device: torch.device) -> float:
    """A time in seconds after everything that was started on the device; so that each phase gets its own."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
