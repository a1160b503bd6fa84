"""The live display: a bar with the step's phase on a terminal, one line a step anywhere else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class TrainingProgress:
    """Shows steps done, what the current step is doing, and a line of figures after each step."""

    def __init__(self, steps: int, done: int, log_line: Callable[[str], None], shown: bool = True) -> None:
        self._console = Console(highlight=False, quiet=not shown)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}  {task.fields[phase]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=steps, completed=done, phase="", eta="")
        self._steps, self._first = steps, done
        self._started = time.monotonic()
        self._utterances = 0
        self._log_line = log_line

    @contextmanager
    def live(self) -> Iterator[TrainingProgress]:
        """Also shows what the package logs meanwhile: servers that start, die and come back."""
        logger, handler = logging.getLogger("negotiator"), _Lines(self.line)
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            with self._bar:
                yield self
        finally:
            logger.removeHandler(handler)

    def phase(self, text: str) -> None:
        self._utterances = 0
        self._bar.update(self._task, phase=text)

    def utterance(self) -> None:
        """One more is spoken in this step."""
        self._utterances += 1
        self._bar.update(self._task, phase=f"negotiating: {self._utterances} utterances")

    def line(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)
        self._log_line(text)

    def step_done(self, metrics: dict[str, Any]) -> None:
        done = metrics["step"]
        remaining = (time.monotonic() - self._started) / (done - self._first) * (self._steps - done)
        eta = f"ETA {int(remaining) // 3600}:{int(remaining) // 60 % 60:02d}:{int(remaining) % 60:02d}"
        self._bar.update(self._task, completed=done, eta=eta)
        self.line(
            f"step {done:>4}/{self._steps}  reward {metrics['reward_mean']:.3f} ± {metrics['reward_std']:.3f}"
            f"  agree {100 * metrics['agreement_rate']:.0f} %  rounds {metrics['rounds_mean']:.1f}"
            f"  loss {metrics['loss']:+.4f}  grad {metrics['grad_norm']:.3f}"
            f"  gap {metrics['logprob_gap']:.1e}  {metrics['tokens_per_s']:.0f} tokens/s"
            f"  {metrics['seconds']['step']:.1f} s  {eta}"
        )

    def evaluated(self, figures: dict[str, Any], best: bool) -> None:
        self.line(
            f"evaluation after step {figures['step']}  reward {figures['reward']:.3f}"
            f"  agree {100 * figures['agreement']:.0f} %  rounds {figures['rounds']:.1f}"
            f"  {figures['dialogues']} held-out dialogues, {figures['failed']} failed"
            f"{'  (best so far)' if best else ''}"
        )


class _Lines(logging.Handler):
    """Hands each record to a function, as a line."""

    def __init__(self, line: Callable[[str], None]) -> None:
        super().__init__()
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        self._line(self.format(record))
