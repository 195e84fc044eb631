"""Pictures of a run: accuracy, parameters and seconds of all methods; a method's matrix, its accuracies over time."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from limpet.scenarios.runner import MethodResult
from limpet.scenarios.seeds import mean_and_error
from limpet.scenarios.streams import Stream

_INK = "#333333"
_COLORS = ("#999999", "#0072B2", "#D55E00", "#009E73", "#CC79A7")  # told apart by the colour-blind, too


def accuracy_matrix(path: Path, stream: Stream, result: MethodResult) -> None:
    """Draw R[i][j] as a heat map into a PNG file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    values = result.matrix.values.numpy() * 100
    names, size = [task.name for task in stream.tasks], len(stream.tasks)
    figure, axes = new_figure(2.2 + 0.75 * size, 1.7 + 0.62 * size)
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for i in range(size):
        for j in range(size):
            if values[i, j] == values[i, j]:  # not NaN: what was not evaluated stays white
                color = "white" if values[i, j] < 60 else "black"
                weight = "bold" if i == j else "normal"
                axes.text(j, i, f"{values[i, j]:.1f}", ha="center", va="center", color=color, weight=weight)
    axes.set_xticks(range(size), names)
    axes.set_yticks(range(size), names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("accuracy on task (%)")
    axes.set_ylabel("after learning task")
    axes.set_title(_title(stream, result, "accuracy matrix"), loc="left")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03, ticks=[0, 25, 50, 75, 100])
    bar.outline.set_visible(False)
    figure.savefig(path, format="png")


def accuracy_curves(path: Path, stream: Stream, result: MethodResult) -> None:
    """Draw the accuracy of each task, from when it is learned on, into a PNG file; one small panel a task.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    size = len(stream.tasks)
    figure, panels = new_figure(7.5, 1.1 + 0.95 * size, rows=size)
    known = [value for _, row in result.curve for value in row if value == value]
    floor = 100 * min([*known, 0.5])
    for task, axes in zip(stream.tasks, panels, strict=True):
        axes.axvspan(task.index, task.index + 1, color="#56B4E9", alpha=0.25, linewidth=0)
        points = [(at, 100 * row[task.index]) for at, row in result.curve]
        before = [point for point in points if point[0] <= task.index]
        since = [point for point in points if point[0] >= task.index]
        axes.plot(*np.array(before).reshape(-1, 2).T, color="#999999", linewidth=1)
        axes.plot(*np.array(since).T, color="#0072B2", linewidth=1.8)
        axes.set_ylim(floor - 4, 104)
        axes.set_xlim(0, size)
        axes.set_yticks([50, 100] if floor >= 46 else [0, 50, 100])
        axes.set_xticks(range(size + 1), [])
        axes.tick_params(length=0)
        for border in range(1, size):
            axes.axvline(border, color="#dddddd", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel(task.name, rotation=0, ha="right", va="center", labelpad=10)
        axes.annotate(
            f"{points[-1][1]:.1f}", (1, points[-1][1]), (5, 0), xycoords=("axes fraction", "data"),
            textcoords="offset points", va="center", color="#0072B2",
        )  # fmt: skip
    panels[-1].set_xticks([i + 0.5 for i in range(size)], [task.name for task in stream.tasks])
    panels[-1].set_xlabel("training on task")
    panels[0].set_title(_title(stream, result, "accuracy on each task (%), shaded while it is learned"), loc="left")
    figure.savefig(path, format="png")


def average_accuracy(path: Path, stream: Stream, methods: Mapping[str, Sequence[MethodResult]]) -> None:
    """Draw each method's mean accuracy on the tasks learned so far, over their number, into a PNG file.

    Over several seeds: the mean, with a band of one standard error to either side.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, axes = new_figure(6.4, 3.6)
    learned = range(1, len(stream.tasks) + 1)
    for (name, runs), color in zip(methods.items(), itertools.cycle(_COLORS)):
        so_far = [[float(run.matrix.values[k - 1, :k].mean()) * 100 for run in runs] for k in learned]
        means, errors = np.array([mean_and_error(values) for values in so_far]).T
        axes.plot(learned, means, color=color, linewidth=1.8, marker="o", markersize=4, label=name)
        if len(runs) > 1:
            axes.fill_between(learned, means - errors, means + errors, color=color, alpha=0.25, linewidth=0)
    axes.set_xticks(learned, [task.name for task in stream.tasks])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_xlabel("after learning task")
    axes.set_ylabel("accuracy on tasks so far (%)")
    axes.legend(frameon=False)
    number = max(map(len, methods.values()))
    seeds = "" if number == 1 else f", mean and standard error of {number} seeds"
    axes.set_title(f"average accuracy{seeds}\n{stream.name}, {stream.setting}-incremental", loc="left")
    figure.savefig(path, format="png")


def parameters_and_seconds(path: Path, stream: Stream, methods: Mapping[str, Sequence[MethodResult]]) -> None:
    """Draw how many parameters each method's network has while a task is learned, and the mean seconds it takes.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, panels = new_figure(6.4, 4.8, rows=2)
    tasks = range(1, len(stream.tasks) + 1)
    for (name, runs), color in zip(methods.items(), itertools.cycle(_COLORS)):
        style: Any = {"color": color, "linewidth": 1.8, "marker": "o", "markersize": 4, "label": name}
        panels[0].plot(tasks, [number / 1e6 for number in runs[0].task_parameters], **style)
        panels[1].plot(tasks, np.mean([run.task_seconds for run in runs], axis=0), **style)
    for axes, label in zip(panels, ("million parameters", "training seconds"), strict=True):
        axes.set_xticks(tasks, [task.name for task in stream.tasks])
        axes.set_ylim(bottom=0)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
    panels[1].set_xlabel("while learning task")
    panels[0].legend(frameon=False)
    panels[0].set_title(f"parameters and seconds over tasks\n{stream.name}, {stream.setting}-incremental", loc="left")
    figure.savefig(path, format="png")


def _title(stream: Stream, result: MethodResult, what: str) -> str:
    """What a picture shows, in one line."""
    return f"{result.method}: {what}\n{stream.name}, {stream.setting}-incremental"


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure with its axes (a list of them where there are several rows), drawn without a screen."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"pictures need {error.name}: pip install 'limpet[cli]'", name=error.name) from None
    style: Any = {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.labelcolor": _INK,
        "axes.edgecolor": "#bbbbbb",
        "xtick.color": _INK,
        "ytick.color": _INK,
        "text.color": _INK,
    }
    with rc_context(style):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, squeeze=False)[:, 0]
    return figure, axes[0] if rows == 1 else list(axes)
