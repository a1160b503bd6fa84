"""Runs a command and sees to it that nothing of it outlives the process that wanted it.

    python -P guard.py PARENT_PID COMMAND ...

It is a process of its own because a process killed with SIGKILL can clean up nothing. It ends the command on SIGTERM,
and when the parent is gone for whatever reason; and with the command's end, the end of every process that the command
started, whatever process group or session those moved to. It exits as the command did (128 + the signal's number).
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import time

import psutil

GRACE_S = 10.0  # for the command to end by itself after SIGTERM; SGLang takes five to seven seconds

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
_libc = ctypes.CDLL(None, use_errno=True)


def main(parent: int, command: list[str]) -> int:
    parent_ends = os.pidfd_open(parent)
    if os.getppid() != parent:  # it ended before it could be watched, and `parent_ends` may be anybody's
        return 1
    told_to_stop, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    signal.set_wakeup_fd(wakeup)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # the byte in the pipe is what counts
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans among the command's processes become children of this one
    with tempfile.TemporaryDirectory(prefix="negotiator-") as scratch:  # what a killed command leaves in its TMPDIR
        process = subprocess.Popen(command, env={**os.environ, "TMPDIR": scratch}, preexec_fn=_die_with_the_guard)
        _wait_for_any(parent_ends, told_to_stop, os.pidfd_open(process.pid))
        _end(process)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _die_with_the_guard() -> None:
    """In the command's process: SIGKILL when the guard itself is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _wait_for_any(*descriptors: int) -> None:
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    poll.poll()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the command to end, then kills it and everything that it left behind."""
    process.terminate()  # nothing happens if it has ended
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    while children := psutil.Process().children():  # those of a killed child are the next round's
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.01)
        _reap()


def _reap() -> None:
    """Collects children that have ended; as their parent by adoption nobody else does."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
