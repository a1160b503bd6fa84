"""Draws a CSV of `benchmarks.learner`: speed, MFU and memory against the tokens of a step, and where its time goes.

python -m benchmarks.learner_plots benchmarks/results/learner-NAME.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Line = dict[str, str]  # of the CSV

QUANTITIES = {
    "logical_tokens_per_s": ("logical tokens / s", 1.0),
    "mfu": ("MFU, computed tokens (%)", 100.0),
    "peak_bytes": ("peak memory (MiB)", 2.0**-20),
}
PHASES = ("forward", "loss", "backward", "optimizer", "other")


def draw(path: Path) -> list[Path]:
    """A PNG beside the CSV."""
    with open(path, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["seconds"]]
    figure, axes = plt.subplots(1, 1 + len(QUANTITIES), figsize=(4.6 * (1 + len(QUANTITIES)), 4.4))
    for ax, (quantity, (label, scale)) in zip(axes, QUANTITIES.items(), strict=False):
        _against_tokens(ax, lines, quantity, scale)
        ax.set_ylabel(label)
    axes[0].legend(frameon=False)
    _phases(axes[-1], [line for line in lines if line["tokens"] == lines[0]["tokens"]])
    about = lines[0]
    title = f"A step of {about['model']}, {about['dtype']}\n{about['device']}, torch {about['torch']}"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return [target]


def _against_tokens(ax: Axes, lines: list[Line], quantity: str, scale: float) -> None:
    for name in dict.fromkeys(line["contender"] for line in lines):
        mine = sorted(
            (int(line["tokens"]), float(line[quantity]) * scale)
            for line in lines
            if line["contender"] == name and line[quantity]
        )
        if mine:
            ax.plot(*zip(*mine, strict=True), "o-" if name == "ours" else "o--", label=name)
    ticks = sorted({int(line["tokens"]) for line in lines})
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=30)
    ax.set_xlabel("packed tokens of a step")
    ax.set_ylim(bottom=0)
    ax.grid(True, alpha=0.3)


def _phases(ax: Axes, lines: list[Line]) -> None:
    names = [line["contender"] for line in lines]
    bottom = [0.0] * len(lines)
    for phase in PHASES:
        heights = [float(line[f"{phase}_seconds"] or 0) for line in lines]
        ax.bar(names, heights, bottom=bottom, label=phase)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    ax.set_ylabel("seconds of a step")
    ax.set_title(f"{int(lines[0]['tokens']):,} packed tokens", fontsize=10)
    ax.legend(frameon=False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.learner_plots CSV")
    print(*draw(Path(sys.argv[1])))
