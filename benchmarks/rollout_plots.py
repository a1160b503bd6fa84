"""Draws a CSV of `benchmarks.rollout`: speed, time and memory against the size of the group and the shared prefix.

python -m benchmarks.rollout_plots benchmarks/results/rollout-NAME.csv
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Line = dict[str, str]  # of the CSV

SHAPE = ("scenarios", "group", "prefix", "new_tokens")
AXES = {"group": "dialogues of a scenario", "prefix": "tokens of the shared prefix"}
QUANTITIES = {
    "tokens_per_s": ("new tokens / s", 1.0),
    "prefill_seconds": ("prefill (s)", 1.0),
    "decode_seconds": ("decoding (s)", 1.0),
    "peak_bytes": ("peak memory (MiB)", 2.0**-20),
}


def draw(path: Path) -> list[Path]:
    """A PNG beside the CSV: a column for each axis that at least three shapes vary, a row for each quantity."""
    with open(path, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["tokens_per_s"]]
    columns = {axis: _varied(lines, axis) for axis in AXES}
    columns = {axis: varied for axis, varied in columns.items() if len({line[axis] for line in varied}) >= 3}
    if not columns:
        return []
    size = (5.6 * len(columns), 2.7 * len(QUANTITIES) + 1)
    figure, grid = plt.subplots(len(QUANTITIES), len(columns), figsize=size, squeeze=False, sharex="col")
    names = list(dict.fromkeys(line["contender"] for varied in columns.values() for line in varied))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    for axes, (quantity, (label, scale)) in zip(grid, QUANTITIES.items(), strict=True):
        for ax, (axis, varied) in zip(axes, columns.items(), strict=True):
            _panel(ax, varied, axis, quantity, scale, colors)
        axes[0].set_ylabel(label)
    for ax, (axis, varied) in zip(grid[0], columns.items(), strict=True):
        ax.set_title(
            ", ".join(f"{name.replace('_', ' ')} {varied[0][name]}" for name in SHAPE if name != axis), fontsize=9
        )
    for ax, axis in zip(grid[-1], columns, strict=True):
        ax.set_xlabel(AXES[axis])

    handles = {name: line for ax in grid.flat for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="lower center", ncols=len(handles), frameon=False)
    about = lines[0]
    title = f"Dialogues of {about['model']}\n{about['device']}, torch {about['torch']}"
    if any(line["status"] == "estimated" for varied in columns.values() for line in varied):
        title += "\nhollow: estimated"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return [target]


def _varied(lines: list[Line], axis: str) -> list[Line]:
    """Those of the largest set of shapes that differ in `axis` alone."""

    def others(line: Line) -> tuple[str, ...]:
        return tuple(line[name] for name in SHAPE if name != axis)

    shapes = {tuple(line[name] for name in SHAPE): others(line) for line in lines}
    most = Counter(shapes.values()).most_common(1)
    return [line for line in lines if most and others(line) == most[0][0]]


def _panel(ax: Axes, lines: list[Line], axis: str, quantity: str, scale: float, colors: dict[str, str]) -> None:
    for name, color in colors.items():
        mine = [line for line in lines if line["contender"] == name and line[quantity]]
        mine.sort(key=lambda line: float(line[axis]))
        x, y = [float(line[axis]) for line in mine], [float(line[quantity]) * scale for line in mine]
        if mine:
            ax.plot(x, y, "-" if name.startswith("embedded") else "--", color=color, label=name)
            faces = ["white" if line["status"] == "estimated" else color for line in mine]
            ax.scatter(x, y, s=24, c=faces, edgecolors=color, zorder=3)
    ax.set_xscale("log", base=2)
    if quantity == "peak_bytes":
        ax.set_ylim(bottom=0)
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ticks = sorted({float(line[axis]) for line in lines})
    ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    ax.grid(True, alpha=0.3)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.rollout_plots CSV")
    print(*draw(Path(sys.argv[1])))
