"""Generation inside the trainer's process, from the trainer's own module: a weight update is a version number.

Continuous batching: each step is one forward pass over the newest token of every running request and a bounded piece
of the prompts of those just admitted. What was computed stays cached for later requests that begin the same way.

The steps run in an asyncio task, one after the other, on the loop's own thread. Nothing depends on time or threads: the
same calls in the same order give the same bits.

    R requests whose next token is wanted    V vocabulary
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from negotiator.config import EngineConfig
from negotiator.engines.base import EngineStats
from negotiator.engines.forward import Forward, HuggingFaceForward, Span
from negotiator.engines.kv_cache import KVCache, Reservation
from negotiator.engines.native_forward import NativeForward, native_forward_off_reason
from negotiator.engines.reuse import PerfectCache
from negotiator.types import Generation, SamplingParams
from negotiator_kernels.availability import triton_off_reason
from negotiator_kernels.sampling import sample_lists


@dataclasses.dataclass(eq=False, slots=True)
class _Request:
    """One call under way. With neither `sampling` nor `targets` it only fills the cache."""

    tokens: list[int]  # the prompt, then what was generated
    prompt_len: int
    sampling: SamplingParams | None
    targets: tuple[int, ...] | None  # tokens whose log-probs after the prompt are asked for
    done: asyncio.Future[Any]
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reusable: int = 0  # prompt tokens that a perfect cache would have held when it arrived
    reservation: Reservation | None = None  # from admission on
    cached: int = 0  # prompt tokens found in the cache
    computed: int = 0  # leading tokens whose keys and values are in the cache

    @property
    def wants_token(self) -> bool:
        return self.sampling is not None or self.targets is not None

    @property
    def capacity(self) -> int:
        """Tokens whose keys and values it needs; nothing follows the last token sampled."""
        return self.prompt_len + (self.sampling.max_tokens - 1 if self.sampling is not None else 0)


def choose_forward(model: PreTrainedModel, cache: KVCache, config: EngineConfig) -> tuple[Forward, str]:
    """The way to compute this model here, and which one it is, in a few words."""
    generic = HuggingFaceForward(model, cache)  # in any case: it refuses models that none of them would get right
    if model.device.type == "cpu":
        if (reason := native_forward_off_reason(model)) is None:
            return NativeForward(model, cache), "native code"
    elif (reason := triton_off_reason()) is None:
        from negotiator.engines.cuda_graphs import GraphedForward, graphed_forward_off_reason  # needs Triton

        if (reason := graphed_forward_off_reason(model)) is None:
            return GraphedForward(model, cache, config), "CUDA graphs"
    return generic, f"the model's own code: {reason}"


class EmbeddedEngine:
    """An `Engine` (see `engines.base`) over a Hugging Face causal LM, on the model's device and in its dtype.

    The module stays the caller's. It must be in eval mode while requests run, and `update_weights` must be called after
    its weights change. Keys and values of `config.cache_tokens` tokens are allocated at once.
    """

    def __init__(self, model: PreTrainedModel, config: EngineConfig, version: int = 0) -> None:
        """Raises ValueError for a model whose attention or logits this engine would get wrong."""
        self._model: Any = model
        self._config = config
        self._version = version
        self._cache = KVCache(model, config.cache_tokens)
        self._perfect = PerfectCache()
        self._forward, self.path = choose_forward(model, self._cache, config)
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        self._stats = EngineStats()

    async def generate(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> Generation:
        """Samples a continuation of `prompt_ids`.

        Raises ValueError if prompt and `max_tokens` do not fit the model's context or the cache.
        """
        if sampling.max_tokens < 1 or sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
            raise ValueError(f"max_tokens must be at least 1, temperature at least 0 and top_p in (0, 1]: {sampling}")
        if not -(2**63) <= sampling.seed < 2**63:
            raise ValueError(f"the seed must fit in 64 bits, not {sampling.seed}")
        result: Generation = await self._submit(prompt_ids, sampling=sampling)
        return result

    async def next_logprobs(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> list[float]:
        """Log-probs (temperature 1, whole vocabulary) of each of `token_ids` as the token after `prompt_ids`.

        Raises ValueError if the prompt does not fit the model's context or the cache.
        """
        self._check_ids(token_ids)
        result: list[float] = await self._submit(prompt_ids, targets=tuple(token_ids))
        return result

    async def warm(self, prefix_ids: Sequence[int]) -> None:
        """Puts a prefix into the cache, so that requests sent together afterwards all share it.

        Its tokens count as prompt tokens: they are computed. Raises ValueError if it does not fit the model's context
        or the cache.
        """
        await self._submit(prefix_ids)

    async def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Serves new weights, and drops every key and value of the old ones. Nothing may be running.

        Tensors that are the model's own parameters, already changed in place, are not copied. Raises ValueError for a
        name or shape the model does not have.
        """
        self.flush()
        own = dict(self._model.named_parameters(remove_duplicate=False))
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name not in own or own[name].shape != tensor.shape:
                    raise ValueError(f"the model has no parameter {name} of shape {tuple(tensor.shape)}")
                if own[name].data_ptr() != tensor.data_ptr():
                    own[name].copy_(tensor)
        self._forward.weights_changed()
        self._version = version

    def flush(self) -> None:
        """Forgets all cached keys and values. Nothing may be running."""
        self._drop_cancelled()
        assert not [*self._running, *self._waiting], "cannot flush while requests are running"
        self._cache.clear()
        self._perfect = PerfectCache()

    async def release(self) -> None:
        """See `engines.base`. There is nothing to lend: the cache is small, and allocated once."""

    def stats(self) -> EngineStats:
        """A copy of the totals so far."""
        return dataclasses.replace(self._stats)

    async def close(self) -> None:
        """Stops; requests under way, and later ones, fail with RuntimeError."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        self._fail(RuntimeError("the engine was closed"))

    # -- requests ------------------------------------------------------------------------------------------------------

    async def _submit(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        targets: tuple[int, ...] | None = None,
    ) -> Any:
        if self._closed:
            raise RuntimeError("the engine was closed")
        if len(prompt_ids) == 0:
            raise ValueError("the prompt is empty; it needs at least one token")
        self._check_ids(prompt_ids)
        loop = asyncio.get_running_loop()
        request = _Request(list(prompt_ids), len(prompt_ids), sampling, targets, loop.create_future())
        tokens = request.prompt_len + (sampling.max_tokens if sampling is not None else 0)
        context = getattr(self._model.config, "max_position_embeddings", tokens)
        if tokens > context:
            raise ValueError(f"prompt and max_tokens take {tokens} tokens, the model's context has {context}")
        if request.capacity > self._config.cache_tokens:
            raise ValueError(
                f"prompt and max_tokens need {request.capacity} tokens of cache, of {self._config.cache_tokens}; "
                "raise engine.cache_tokens"
            )
        request.reusable = self._perfect.reusable(prompt_ids)
        self._waiting.append(request)
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run())
        return await request.done

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocabulary = self._model.config.vocab_size
        if len(ids) and not 0 <= min(ids) <= max(ids) < vocabulary:
            raise ValueError(f"token ids must be between 0 and {vocabulary - 1}, not {min(ids)} to {max(ids)}")

    def _admit(self, request: _Request) -> bool:
        """Reserves all it will ever need, so that what runs never gets stuck; False while there is no room.

        A request alone always finds room: nothing else is reserved then, and it was compared with the whole cache.
        """
        # The last prompt token is computed in any case where its logits are wanted.
        reusable = request.tokens[: request.prompt_len - request.wants_token]
        request.reservation = self._cache.reserve(reusable, request.capacity)
        if request.reservation is None:
            return False
        request.cached = request.computed = request.reservation.shared
        self._waiting.remove(request)
        self._running.append(request)
        return True

    def _share(self, request: _Request) -> None:
        assert request.reservation is not None
        self._cache.share(request.reservation, request.tokens[: request.computed])

    def _finish(self, request: _Request, result: object) -> None:
        self._share(request)
        self._release(request)
        self._stats.prompt_tokens += request.prompt_len
        self._stats.cached_prompt_tokens += request.cached
        # Requests under way share what they have computed so far, so more may be cached than had been finished.
        self._stats.reusable_prompt_tokens += max(request.reusable, request.cached)
        self._perfect.hold(request.tokens[: request.computed])
        self._stats.generated_tokens += len(request.tokens) - request.prompt_len
        request.done.set_result(result)

    def _release(self, request: _Request) -> None:
        """Takes a request off the engine, and from the cache what it alone holds."""
        if request.reservation is None:
            self._waiting.remove(request)
        else:
            self._cache.release(request.reservation)
            self._running.remove(request)

    def _drop_cancelled(self) -> None:
        for request in [*self._running, *self._waiting]:
            if request.done.cancelled():
                self._release(request)

    def _fail(self, error: Exception) -> None:
        requests = [*self._running, *self._waiting]
        for request in requests:  # all of them first: releasing may fail too, if the error is this engine's own
            if not request.done.cancelled():
                request.done.set_exception(error)
        for request in requests:
            self._release(request)

    # -- steps ---------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Steps until nothing is left to do."""
        try:
            while self._running or self._waiting:
                self._step()
                await asyncio.sleep(0)  # the callers of finished requests go on, and may send new ones
        except Exception as error:
            self._fail(error)

    def _step(self) -> None:
        self._drop_cancelled()
        work = self._schedule()
        if not work:
            return
        started = time.perf_counter()
        total = sum(count for _, count in work)
        decoded = sum(request.computed >= request.prompt_len for request, _ in work)
        if self._model.training:
            raise ValueError("the model is in training mode; call model.eval() before generating")
        spans: list[Span] = []
        asking: list[_Request] = []  # whose next token is wanted
        rows: list[int] = []  # and the last of their tokens, numbered through the pass
        finished: list[tuple[_Request, object]] = []
        row = -1
        for request, count in work:
            assert request.reservation is not None
            row += count
            end = request.computed + count
            spans.append(Span(request.reservation, request.computed, end, request.tokens[request.computed : end]))
            if end == len(request.tokens):
                if request.wants_token:
                    asking.append(request)
                    rows.append(row)
                else:
                    finished.append((request, None))
        logits = self._forward(spans, rows)
        for request, count in work:
            request.computed += count
            if request.computed == request.prompt_len:
                self._share(request)  # now, not at the end: whoever is admitted next may begin the same way
        if asking:
            finished += self._next_tokens(asking, logits)
        seconds = time.perf_counter() - started
        self._stats.forward_passes += 1
        self._stats.decode_seconds += seconds * decoded / total
        self._stats.prefill_seconds += seconds * (total - decoded) / total
        for request, result in finished:
            self._finish(request, result)

    def _schedule(self) -> list[tuple[_Request, int]]:
        """The requests of the next forward pass and their numbers of tokens in it; admits in order of arrival."""
        work: list[tuple[_Request, int]] = []
        budget = self._config.prefill_tokens
        for request in self._running:
            prompt_left = request.prompt_len - request.computed
            count = min(prompt_left, budget) if prompt_left > 0 else 1
            budget -= count if prompt_left > 0 else 0
            if count:
                work.append((request, count))
        while budget and self._waiting and len(self._running) < self._config.max_running:
            request = self._waiting[0]
            if not self._admit(request):
                assert self._running, "a request that fits the cache found no room in an idle engine"
                break
            count = min(request.prompt_len - request.computed, budget)
            budget -= count
            if count:
                work.append((request, count))
            else:  # asked to cache what is cached
                self._finish(request, None)
        return work

    def _next_tokens(self, requests: Sequence[_Request], logits: torch.Tensor) -> list[tuple[_Request, object]]:
        """Lets each request use its row of `logits` [R, V]; returns those that are finished, with their results."""
        finished: list[tuple[_Request, object]] = []
        sampled: list[tuple[_Request, SamplingParams, int]] = []
        for row, request in enumerate(requests):
            if request.targets is not None:
                finished.append((request, torch.log_softmax(logits[row], dim=-1)[list(request.targets)].tolist()))
            elif request.sampling is not None:
                sampled.append((request, request.sampling, row))
        if not sampled:
            return finished
        if len(sampled) < len(requests):
            logits = logits[[row for _, _, row in sampled]]
        ids, logprobs = sample_lists(
            logits,
            temperature=[sampling.temperature for _, sampling, _ in sampled],
            top_p=[sampling.top_p for _, sampling, _ in sampled],
            seeds=[sampling.seed for _, sampling, _ in sampled],
            positions=[len(request.logprobs) for request, _, _ in sampled],
        )
        for (request, sampling, _), token, logprob in zip(sampled, ids, logprobs, strict=True):
            request.tokens.append(token)
            request.logprobs.append(logprob)
            if token in sampling.stop_ids:
                finished.append((request, self._generation(request, "stop")))
            elif len(request.logprobs) == sampling.max_tokens:
                finished.append((request, self._generation(request, "length")))
        return finished

    def _generation(self, request: _Request, finish_reason: Literal["stop", "length"]) -> Generation:
        ids = tuple(request.tokens[request.prompt_len :])
        return Generation(ids, tuple(request.logprobs), finish_reason, request.cached, self._version)
