"""Draws a CSV of `benchmarks.kernels`: time and memory against trained fraction, tokens, vocabulary and hidden size.

python -m benchmarks.plots benchmarks/results/kernels-NAME.csv
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

AXES = {"fraction": "trained fraction", "tokens": "tokens", "vocabulary": "vocabulary", "hidden": "hidden size"}
QUANTITIES = {"ms": ("time", "time (ms)", 1.0), "peak_bytes": ("memory", "extra memory (MiB)", 2.0**-20)}
STYLES = {"ours": ("-", 2.6), "rival": ("--", 1.4), "compacted": ("-.", 1.4), "cross-entropy": (":", 1.8)}
COLUMNS = 2


def draw(path: Path) -> list[Path]:
    """A PNG for time and one for memory beside the CSV; a panel for each thing that at least three shapes vary."""
    with open(path, newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["ms"]]
    panels = {axis: _varied(lines, axis) for axis in AXES}
    panels = {axis: varied for axis, varied in panels.items() if len({line[axis] for line in varied}) >= 3}
    return [_figure(path, quantity, lines[0], panels) for quantity in QUANTITIES] if panels else []


def _figure(path: Path, quantity: str, about: Line, panels: dict[str, list[Line]]) -> Path:
    word, label, scale = QUANTITIES[quantity]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6.2 * columns, 4.2 * rows + 1), squeeze=False)
    names = sorted({line["provider"] for varied in panels.values() for line in varied if line["kind"] != "gemms"})
    colors = {name: f"C{i}" for i, name in enumerate(names)}
    for ax, (axis, varied) in zip(grid.flat, panels.items(), strict=False):
        _panel(ax, varied, axis, quantity, scale, colors)
        ax.set_ylabel(label)
    for ax in grid.flat[len(panels) :]:
        ax.axis("off")

    handles = {name: line for ax in grid.flat for line, name in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="lower center", ncols=5, frameon=False)
    title = f"Masked GRPO loss, forward and backward\n{about['dtype']}, {about['device']}, torch {about['torch']}"
    if any(line["status"] == "estimated" for varied in panels.values() for line in varied):
        title += "\nhollow: estimated from fewer tokens"
    figure.suptitle(title, fontsize=12)
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    target = path.with_name(f"{path.stem}-{word}.png")
    figure.savefig(target, dpi=110)
    plt.close(figure)
    return target


def _varied(lines: list[Line], axis: str) -> list[Line]:
    """Those of the largest set of shapes that differ in `axis` alone."""

    def others(line: Line) -> tuple[str, ...]:
        return tuple(line[name] for name in AXES if name != axis)

    shapes = {tuple(line[name] for name in AXES): others(line) for line in lines}
    ((most, _),) = Counter(shapes.values()).most_common(1)
    return [line for line in lines if others(line) == most]


def _panel(ax: Axes, lines: list[Line], axis: str, quantity: str, scale: float, colors: dict[str, str]) -> None:
    for name in sorted({line["provider"] for line in lines}):
        mine = [line for line in lines if line["provider"] == name and line[quantity]]
        mine.sort(key=lambda line: float(line[axis]))
        x, y = [float(line[axis]) for line in mine], [float(line[quantity]) * scale for line in mine]
        if not mine or (mine[0]["kind"] == "gemms" and quantity != "ms"):
            continue
        if mine[0]["kind"] == "gemms":
            ax.plot(x, y, "-", linewidth=1.2, color="0.6", label=name)
            continue
        style, width = STYLES[mine[0]["kind"]]
        label = f"{name} (ours)" if mine[0]["kind"] == "ours" else name
        ax.plot(x, y, style, linewidth=width, color=colors[name], label=label)
        faces = ["white" if line["status"] == "estimated" else colors[name] for line in mine]
        ax.scatter(x, y, s=28, c=faces, edgecolors=colors[name], zorder=3)

    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if axis != "fraction":
        ax.set_xscale("log")
        ax.minorticks_off()
    ticks = sorted({float(line[axis]) for line in lines})
    ax.set_xticks(ticks, [f"{tick:,g}" if tick <= 1 else f"{tick:,.0f}" for tick in ticks])
    ax.set_xlabel(AXES[axis])
    ax.set_title(", ".join(f"{AXES[n]} {float(lines[0][n]):,.6g}" for n in AXES if n != axis), fontsize=9)
    ax.grid(True, alpha=0.3)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m benchmarks.plots CSV")
    print(*draw(Path(sys.argv[1])))
