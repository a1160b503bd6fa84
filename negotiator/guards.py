"""What keeps a run from going wrong unnoticed.

Checks on a step, the signals that end a run, a watch over long waits, and mistakes that are told once.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from negotiator.learner import LearnerStats
from negotiator.types import DialogueGroup

SKIPPED_IN_A_ROW = 3  # steps, after which a run stops
LARGEST_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}
STDERR = 2
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def skipped(stats: LearnerStats) -> bool:
    """Whether there was something to learn, and a loss or gradient that is not finite kept it from the weights."""
    return stats.computed_tokens > 0 and not stats.updated


def too_many_failed(groups: Sequence[DialogueGroup], most: float) -> str:
    """What to tell where none of a step's dialogues ended, or more failed than the share `most`; else nothing."""
    dialogues = [dialogue for group in groups for dialogue in group.dialogues]
    failures = [dialogue.failure for dialogue in dialogues if dialogue.state == "failed"]
    if len(failures) < len(dialogues) and len(failures) <= most * len(dialogues):
        return ""
    return (
        f"{len(failures)} of {len(dialogues)} dialogues failed (judge.max_failed is {most:g}); the first: {failures[0]}"
    )


def require_patience(skipped_in_a_row: int, folder: Path) -> None:
    if skipped_in_a_row == SKIPPED_IN_A_ROW:
        raise RuntimeError(
            f"{skipped_in_a_row} steps in a row had no finite loss and gradient; their batches are in {folder}"
        )


def require_agreement(logprob_gap: float, dtype: torch.dtype) -> None:
    """For the first step that trains: the trainer gives the tokens the probabilities that they were drawn with."""
    if logprob_gap > LARGEST_GAP[dtype]:
        raise RuntimeError(
            f"trainer and engine disagree: their log-probs differ by {logprob_gap:.2g} a token, and more than "
            f"{LARGEST_GAP[dtype]:g} is no rounding; check that the engine serves the same model, in the same "
            "precision and chat template, and that its log-probs are those of the sampling temperature before top-p"
        )


def fingerprint(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> int:
    """Of the weights as an engine that computes in `dtype` gets them: the sum of their bits, read as integers."""
    bits = {4: torch.int32, 2: torch.int16}[dtype.itemsize]
    return sum(int(tensor.detach().to(dtype).view(bits).sum(dtype=torch.int64)) for _, tensor in weights)


def require_change(before: int, after: int) -> None:
    """Of the fingerprints around the first update."""
    if before == after:
        raise RuntimeError(
            "the first update changed no weight that the engine serves: check optimizer.lr, and that the weights sent "
            "are those that are trained"
        )


class StopSignals:
    """Within its block SIGTERM and SIGUSR1 only leave their number in `caught`; a second one ends the process at once.

    Slurm sends them ahead of a time limit or a pre-emption; torchrun hands SIGTERM on to its processes.
    """

    def __init__(self) -> None:
        self.caught = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._catch) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        text = f"{signal.Signals(number).name}: the run ends after this step; a second signal ends it at once\n"
        os.write(STDERR, text.encode())  # print may be what was interrupted


class Watchdog:
    """Shows what every thread of this process is doing when nothing has moved for `limit_s`, once a stand-still.

    Its limit lies below that of collectives: who waits for another process is seen before the wait ends in an error.
    """

    def __init__(self, limit_s: float, name: str) -> None:
        """`name`: of this process, for the reader of all their messages."""
        self._limit, self._name = limit_s, name
        self._at: tuple[str, float] = ("starting", time.monotonic())
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def moved(self, to: str | None = None) -> None:
        """Something was done; `to` says what comes now, where that is another thing."""
        self._at = (to or self._at[0], time.monotonic())

    def _watch(self) -> None:
        reported = None
        while not self._stopped.wait(self._limit / 20):
            at = what, since = self._at
            if at is not reported and time.monotonic() - since > self._limit:
                reported = at
                text = f"{self._name}: nothing moved for {self._limit:.0f} s while {what}; its threads:\n"
                os.write(STDERR, text.encode())
                faulthandler.dump_traceback(STDERR)


def tell_once(mistake: str) -> None:
    """Prints what went wrong, from the first process, and from another one only if the first did not say the same."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank == 0:
        print(mistake, file=sys.stderr, flush=True)
    if size == 1:
        return
    key, soon, said = "negotiator/mistake", timedelta(seconds=5), ""
    try:  # not by collectives, which need all processes: maybe only some went wrong
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, timeout=soon)  # type: ignore[attr-defined]  # not re-exported by name
        if rank == 0:
            store.set(key, mistake)
            store.wait([f"{key}/heard/{other}" for other in range(1, size)])  # the store may end with this process
        else:
            said = store.get(key).decode()
            store.set(f"{key}/heard/{rank}", "")
    except dist.DistError:
        pass  # the others went on without a mistake, or ended before they could be asked
    if rank and said != mistake:
        print(f"process {rank}: {mistake}", file=sys.stderr)
