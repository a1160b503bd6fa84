"""Hugging Face `generate` as the rollout benchmark's rival: all dialogues in one batch, at its fastest honest setting.

No padding (all prompts are of one length), its own fused attention and growing cache, logits of the last token alone.

    plain          every dialogue's prompt is computed, as one call of `generate` does
    shared prefix  the prefixes are computed once, a forward pass for all scenarios, and their cache is repeated for the
                   dialogues of a group before `generate` goes on from there: what a careful user of it would write

What would take longer than its limit is estimated instead: the time of one prompt times their number, and for every
new token but the first the mean of TRIAL_STEPS decoding steps of the whole batch over that prompt's cache, repeated.
That favours Hugging Face: the cache of so many different prompts is no quicker to read.

B  dialogues    S  scenarios    P  tokens of a prefix    L  tokens of a prompt    N  new tokens
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from benchmarks.workload import TEMPERATURE, TOP_P, Shape, Workload
from negotiator.models import load_model

TRIAL_STEPS = 3
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"  # its earlier name


def extrapolate(shape: Shape, prompt: float, steps: float) -> tuple[float, float]:
    """Seconds of prefill and of decoding, from those of one prompt and of TRIAL_STEPS steps."""
    return shape.dialogues * prompt, (shape.new_tokens - 1) * steps / TRIAL_STEPS


class HuggingFace:
    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype, share_prefix: bool) -> None:
        self._model: Any = load_model(model, device, dtype)
        self._model.generation_config = GenerationConfig(  # in place of the model's own, which may end texts early
            do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0, pad_token_id=0
        )
        self._device = device
        self._share_prefix = share_prefix
        self._expected: dict[Shape, tuple[float, float]] = {}

    def expected(self, workload: Workload) -> tuple[float, float]:
        """Seconds of prefill and of decoding, by the rule above."""
        shape = workload.shape
        if shape not in self._expected:
            first = torch.tensor(workload.prompts[:1], device=self._device)
            started = time.perf_counter()
            cache = self._prefill(first[:, :-1])
            self._wait()
            prompt = time.perf_counter() - started
            cache.batch_repeat_interleave(shape.dialogues)
            _, steps = self._generate(first.expand(shape.dialogues, -1), 1 + TRIAL_STEPS, cache)
            self._expected[shape] = extrapolate(shape, prompt, steps)
        return self._expected[shape]

    def generate(self, workload: Workload) -> tuple[float, float]:
        """Seconds until every dialogue has its first token, and from there to the end."""
        torch.manual_seed(0)
        started = time.perf_counter()
        cache = None
        if self._share_prefix:
            cache = self._prefill(torch.tensor(workload.prefixes, device=self._device))
            cache.batch_repeat_interleave(workload.shape.group)
        before = time.perf_counter() - started
        prompts = torch.tensor(workload.prompts, device=self._device)
        first, rest = self._generate(prompts, workload.shape.new_tokens, cache)
        return before + first, rest

    @torch.no_grad()
    def _prefill(self, ids: Tensor) -> Any:
        return getattr(self._model(ids, use_cache=True, logits_to_keep=1), CACHE)

    def _generate(self, prompts: Tensor, new_tokens: int, cache: Any) -> tuple[float, float]:
        """Seconds to the first new token of prompts [B, L], whose first tokens `cache` may hold, and to the rest."""
        first: list[float] = []

        class Clock(StoppingCriteria):
            def __call__(clock, ids: Tensor, scores: Any, **_: Any) -> Tensor:
                if not first:
                    self._wait()
                    first.append(time.perf_counter())
                return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        started = time.perf_counter()
        texts = self._model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            **{CACHE: cache},
            max_new_tokens=new_tokens,
            stopping_criteria=[Clock()],
        )
        self._wait()
        ended = time.perf_counter()
        assert texts.shape == (len(prompts), prompts.shape[1] + new_tokens), "a text ended early"
        return first[0] - started, ended - first[0]

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
