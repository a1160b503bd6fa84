"""Draws a CSV of `benchmarks.throughput`: the seconds of a step by phase, in all ways and as it grows.

python -m benchmarks.throughput_plots benchmarks/results/throughput-NAME.csv
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

AXES = {"scenarios": "scenarios", "group": "dialogues of a scenario", "max_tokens": "tokens of a text, at most"}


def draw(path: Path) -> list[Path]:
    """A PNG beside the CSV: the first shape in all ways, then a panel for each thing that others vary."""
    with open(path, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["seconds"]]
    first = lines[0]
    same = [line for line in lines if all(line[axis] == first[axis] for axis in AXES)]
    panels = {
        f"{first['scenarios']} x {first['group']} dialogues, {first['max_tokens']} tokens": {
            _way(line): line for line in same
        }
    }
    for axis, label in AXES.items():
        others = [name for name in (*AXES, "judge", "processes") if name != axis]
        varied = [line for line in lines if all(line[name] == first[name] for name in others)]
        if len(varied) > 1:
            panels[label] = {line[axis]: line for line in sorted(varied, key=lambda line: int(line[axis]))}

    width = 3.6 * len(panels) + 1.8
    figure, axes = plt.subplots(1, len(panels), figsize=(width, 4.8), squeeze=False)
    for ax, (label, bars) in zip(axes[0], panels.items(), strict=True):
        _bars(ax, bars)
        ax.set_xlabel(label)
    axes[0][0].set_ylabel("seconds of a step")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="center right", frameon=False)  # in the order of the bars
    title = f"Training steps of {first['model']}, {first['dtype']}\n{first['device']}, torch {first['torch']}"
    figure.suptitle(f"{title}\non the bars: trained tokens a second", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1 - 1.3 / width, 1))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return [target]


def _way(line: Line) -> str:
    count = f"{line['processes']} process{'es' * (line['processes'] != '1')}"
    return count if line["judge"] == "made-up" else f"{count},\n{line['judge']} judge"


def _bars(ax: Axes, bars: dict[str, Line]) -> None:
    bottom = [0.0] * len(bars)
    for phase in (name for name in next(iter(bars.values())) if name.endswith("_seconds")):
        heights = [max(0.0, float(line[phase])) for line in bars.values()]
        ax.bar(list(bars), heights, bottom=bottom, label=phase.removesuffix("_seconds"))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for number, (top, line) in enumerate(zip(bottom, bars.values(), strict=True)):
        ax.annotate(f"{float(line['trained_tokens_per_s']):,.1f}", (number, top), ha="center", va="bottom", fontsize=9)
    ax.margins(y=0.1)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.throughput_plots CSV")
    print(*draw(Path(sys.argv[1])))
