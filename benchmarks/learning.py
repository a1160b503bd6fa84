"""Does it learn? Trains on a programmatic reward that a 135M model can learn; reports the mean reward by step.

    python -m benchmarks.learning                 the run of the README
    python -m benchmarks.learning --steps 10      a quick look

The reward (`negotiator.judges.rewards:asks_a_question`) is 5 times the share of utterances that ask a question;
agreement is taken for granted after one round. Everything else is the real job: real model, real dilemmas, the same
command a user runs. The last line on stdout is JSON; the curve goes to `benchmarks/results/learning.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import sys
from datetime import date
from pathlib import Path

import torch

from negotiator import train

CONFIG = Path("configs/questions.yaml")
RESULT = Path("benchmarks/results/learning.csv")
COLUMNS = ("step", "reward_mean", "reward_std", "zero_variance_groups", "grad_norm", "entropy", "logprob_gap")
WINDOW = 5  # steps averaged at either end


def main() -> int:
    parser = argparse.ArgumentParser(description="Trains on a programmatic reward and reports the reward's rise.")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps (default: 60)")
    parser.add_argument("--name", default="learning", help="name of the run folder (default: learning)")
    arguments = parser.parse_args()
    if arguments.steps < 2 * WINDOW:
        parser.error(f"--steps must be at least {2 * WINDOW}")

    code = train.main(["--config", str(CONFIG), "--name", arguments.name, "--steps", str(arguments.steps)])
    if code:
        return code
    lines = (Path("runs") / arguments.name / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    where = {"device": device, "torch": torch.__version__, "date": date.today().isoformat()}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    with open(RESULT, "w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *where], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | where for row in rows)

    rewards = [row["reward_mean"] for row in rows]
    print("\nmean reward (0 to 5)")
    for start in range(0, len(rewards), WINDOW):
        mean = statistics.fmean(rewards[start : start + WINDOW])
        print(f"  steps {start + 1:>3}-{min(start + WINDOW, len(rewards)):>3}  {mean:.2f}  {'#' * round(8 * mean)}")
    first, last = statistics.fmean(rewards[:WINDOW]), statistics.fmean(rewards[-WINDOW:])
    seconds = sum(row["seconds"]["step"] for row in rows)
    print(json.dumps({"reward_first": first, "reward_last": last, "steps": len(rows), "seconds": round(seconds)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
