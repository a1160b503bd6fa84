"""Who trains in the learner benchmark: one step on the same samples, from packing or padding to the new weights.

    ours            `pack`, `Learner.step`
    ours-separate   the same of samples that share no prefix
    hf              what one writes with Hugging Face and torch alone: samples of like length padded to batches, logits
                    of the utterances, log-softmax, the clipped and corrected loss, AdamW. Weights are fp32; autocast
                    multiplies in bf16 where ours does. Where memory does not do for a micro-batch, half of it, and
                    so on, which is told

All weights are random.

B = samples of a padded batch, L = its longest, R = its longest response, V = vocabulary.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.decode import make_model
from benchmarks.learner_workload import Workload, separate
from negotiator.config import LossConfig, OptimizerConfig
from negotiator.flops import Work
from negotiator.learner import Learner
from negotiator.loss import default_denominator
from negotiator.packing import pack
from negotiator.types import TurnSample

TEMPERATURE = 0.7
LOSS = LossConfig()


class Place(NamedTuple):
    """What it trains, and how."""

    config: PretrainedConfig
    device: torch.device
    dtype: torch.dtype  # that it multiplies in
    optimizer: OptimizerConfig

    def make_model(self, dtype: torch.dtype) -> PreTrainedModel:
        return make_model(deepcopy(self.config), self.device, dtype)  # a model writes into its configuration


class Played(NamedTuple):
    """One step."""

    seconds: float
    forward_seconds: float
    loss_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    logical_tokens: int  # of the samples, each with its own prefix
    work: Work
    passes: int
    loss: float
    grad_norm: float
    peak_bytes: int | None = None

    def __str__(self) -> str:
        return f"{self.seconds:,.2f} s, {self.logical_tokens / self.seconds:,.1f} logical tokens/s"

    @property
    def cost(self) -> float:
        return self.seconds


class LearnerPlayer:
    def __init__(self, place: Place, shared: bool) -> None:
        self._place, self._shared = place, shared
        model = place.make_model(place.dtype)
        self.learner = Learner(model, place.optimizer, LOSS, TEMPERATURE)
        self._step = 0
        prefixes = "prefixes computed once" if shared else "a prefix for every sample"
        self.about = f"{place.dtype}, {prefixes}, {self.learner.path}, recomputed: {place.optimizer.recompute}"

    def play(self, workload: Workload) -> Played:
        samples = workload.samples if self._shared else separate(workload.samples)
        self._step += 1  # never 0: no engine sampled these texts, so its log-probs and the learner's disagree
        started = time.perf_counter()
        batches = pack(samples, self._place.optimizer.micro_batch_tokens)
        stats = self.learner.step(self._step, batches, denominator(samples))
        wait(self._place.device)
        assert stats.updated, f"the step was skipped: loss {stats.loss}, gradient {stats.grad_norm}"
        return Played(
            seconds=time.perf_counter() - started,
            forward_seconds=stats.forward_seconds,
            loss_seconds=stats.loss_seconds,
            backward_seconds=stats.backward_seconds,
            optimizer_seconds=stats.optimizer_seconds,
            logical_tokens=stats.logical_tokens,
            work=Work.of_batches(batches),
            passes=len(batches),
            loss=stats.loss,
            grad_norm=stats.grad_norm,
        )

    def processes(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None: ...


class HuggingFacePlayer:
    def __init__(self, place: Place) -> None:
        self._place, self._micro_batch = place, place.optimizer.micro_batch_tokens
        self.model = place.make_model(torch.float32)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=place.optimizer.lr,
            betas=place.optimizer.betas,
            weight_decay=place.optimizer.weight_decay,
            fused=place.device.type == "cuda",
        )
        self.about = f"{place.dtype}, padded batches, {self.model.config._attn_implementation} attention"

    def play(self, workload: Workload) -> Played:
        while True:
            try:
                return self._step(workload.samples)
            except torch.OutOfMemoryError:
                self._micro_batch //= 2
                if self._micro_batch < max(_length(sample) for sample in workload.samples):
                    raise
            print(f"out of memory: {self._micro_batch} tokens a pass instead", flush=True)
            self._optimizer.zero_grad()
            torch.cuda.empty_cache()

    def _step(self, samples: Sequence[TurnSample]) -> Played:
        seconds = dict.fromkeys(("forward", "loss", "backward", "optimizer"), 0.0)
        place, tokens, total = self._place, denominator(samples), 0.0
        started = last = time.perf_counter()

        def lap(phase: str) -> None:
            nonlocal last
            wait(place.device)
            now = time.perf_counter()
            seconds[phase] += now - last
            last = now

        batches = padded_batches(samples, self._micro_batch)
        for batch in batches:
            tensors = _padded(batch, place.device)
            kept = tensors["responses"].shape[1]
            with torch.autocast(place.device.type, torch.bfloat16, enabled=place.dtype == torch.bfloat16):
                logits = self.model(
                    input_ids=tensors["input_ids"],
                    attention_mask=tensors["attention_mask"],
                    position_ids=tensors["position_ids"],
                    use_cache=False,
                    logits_to_keep=kept,
                ).logits  # [B, R, V]
            lap("forward")
            loss = _loss(logits, tensors) / tokens
            del logits
            lap("loss")
            loss.backward()
            total += loss.item()
            lap("backward")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), place.optimizer.max_grad_norm, error_if_nonfinite=True)
        self._optimizer.step()
        self._optimizer.zero_grad()
        lap("optimizer")
        work = Work.of_samples(samples)
        return Played(
            seconds=last - started,
            **{f"{phase}_seconds": value for phase, value in seconds.items()},
            logical_tokens=work.tokens,
            work=work,
            passes=len(batches),
            loss=total,
            grad_norm=norm.item(),
        )

    def processes(self) -> list[int]:
        return [os.getpid()]

    def close(self) -> None: ...


def padded_batches(samples: Sequence[TurnSample], max_tokens: int) -> list[list[TurnSample]]:
    """Samples of like length together, each batch as many as make `max_tokens` with their padding."""
    batches: list[list[TurnSample]] = [[]]
    for sample in sorted(samples, key=_length, reverse=True):
        if batches[-1] and _length(batches[-1][0]) * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(sample)
    return batches


def _padded(samples: Sequence[TurnSample], device: torch.device) -> dict[str, Tensor]:
    """All padded on the left, so that the rows that predict responses are the last R of all."""

    def left(rows: Sequence[Sequence[Any]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")

    input_ids = left([sample.prompt_ids + sample.response_ids[:-1] for sample in samples])
    attention_mask = left([[1] * _length(sample) for sample in samples])
    tensors = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(-1) - 1).clamp(min=0),
        "responses": left([sample.response_ids for sample in samples]),
        "mask": left([[True] * len(sample.response_ids) for sample in samples]),
        "sampling_logprobs": left([sample.sampling_logprobs for sample in samples]),
        "advantages": torch.tensor([[sample.advantage] for sample in samples]),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _loss(logits: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """The sum over trained tokens of DAPO's loss with truncated importance sampling, on-policy."""
    logprobs = (logits.float() / TEMPERATURE).log_softmax(-1)  # [B, R, V]
    logprobs = logprobs.gather(-1, tensors["responses"][..., None]).squeeze(-1)  # [B, R]
    advantages, old = tensors["advantages"], logprobs.detach()
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - LOSS.clip_low, 1 + LOSS.clip_high)
    weights = (old - tensors["sampling_logprobs"]).exp().clamp(max=LOSS.importance_cap)
    return -(weights * torch.min(ratio * advantages, clipped * advantages) * tensors["mask"]).sum()


def _length(sample: TurnSample) -> int:
    return len(sample.prompt_ids) + len(sample.response_ids) - 1


def denominator(samples: Sequence[TurnSample]) -> float:
    return default_denominator(LOSS.type, [len(sample.response_ids) for sample in samples])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
