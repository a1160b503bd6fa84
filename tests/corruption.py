"""Ways in which a loss kernel could be slightly wrong. `pytest --corrupt NAME` runs the tests with one of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from negotiator_kernels import fused, native
from negotiator_kernels.fused import Kernels


def _exponentials(change: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[Kernels], Kernels]:
    """`change` may alter values [C, V], sums [C] and moments [C] in place."""

    def wrap(kernels: Kernels) -> Kernels:
        def wrong(x: Tensor, w: Tensor, anchors: Tensor, temperature: float, out: Tensor | None) -> tuple[Tensor, ...]:
            values = x.new_empty(len(x), len(w)) if out is None else out
            sums, moments = kernels.exponentials(x, w, anchors, temperature, values)
            change(values, sums, moments)
            return sums, moments

        return kernels._replace(exponentials=wrong)

    return wrap


def _ignored_temperature(kernels: Kernels) -> Kernels:
    return kernels._replace(exponentials=lambda x, w, anchors, _, out: kernels.exponentials(x, w, anchors, 1.0, out))


def _rounded_weight(kernels: Kernels) -> Kernels:
    """As if logits went through fewer bits than fp32 has."""

    def wrong(hidden: Tensor, weight: Tensor, anchors: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, ...]:
        return kernels.exponentials(hidden, weight * (1 + 2**-12), anchors, temperature, out)

    return kernels._replace(exponentials=wrong)


def _entropy_gradient(kernels: Kernels) -> Kernels:
    return kernels._replace(entropy_gradient_=lambda v, alpha, beta: kernels.entropy_gradient_(v, alpha, 0.9 * beta))


CORRUPTIONS: dict[str, Callable[[Kernels], Kernels]] = {
    "sums": _exponentials(lambda values, sums, moments: sums.mul_(1.0001)),
    "moments": _exponentials(lambda values, sums, moments: moments.mul_(1.001)),
    "last_column": _exponentials(lambda values, sums, moments: values[:, -1:].zero_()),
    "last_row": _exponentials(lambda values, sums, moments: values[-1:].mul_(1.1)),
    "phantom_column": _exponentials(lambda values, sums, moments: sums.add_(values[:, -1])),
    "temperature": _ignored_temperature,
    "logits": _rounded_weight,
    "entropy_gradient": _entropy_gradient,
    "objective": lambda kernels: kernels._replace(
        objective_gradient=lambda *arguments: 1.01 * kernels.objective_gradient(*arguments)
    ),
}


def corrupt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the backends that run without a GPU wrong in the way called `name`."""
    for module, attribute in ((fused, "TORCH"), (native, "CPU")):
        monkeypatch.setattr(module, attribute, CORRUPTIONS[name](getattr(module, attribute)))
