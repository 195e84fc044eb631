"""Time and peak memory over the batch size: a column per model, a line per method, named at its end."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from peers.measure import WRONG

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

# Okabe and Ito's colours, which the colour-blind can tell apart; dashes and markers tell them apart without colour.
STYLES: dict[str, tuple[str, Any, str]] = {
    "limpet": ("#000000", "-", "o"),
    "limpet, one batch": ("#000000", ":", "o"),
    "loop": ("#999999", "-", "s"),
    "vmap": ("#0072B2", "-", "^"),
    "vmap, chunks": ("#0072B2", "--", "^"),
    "BackPACK": ("#D55E00", "-", "D"),
    "Opacus, hooks": ("#009E73", "-", "v"),
    "Opacus, ExpandedWeights": ("#009E73", "--", "v"),
    "ASDL": ("#CC79A7", "-", "P"),
    "nngeometry": ("#E69F00", "-", "X"),
    "Avalanche": ("#56B4E9", "--", "*"),
}


def short(method: str) -> str:
    """A method's name as the lines are labelled."""
    if method.startswith("limpet"):
        return "limpet, one batch" if "one batch" in method else "limpet"
    if method.startswith("vmap"):
        return "vmap, chunks" if "chunks" in method else "vmap"
    return next((name for name in STYLES if method.startswith(name)), method)


def apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions moved as little as need be so that neighbours are ``gap`` apart and all lie within the bounds."""
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [positions[i] for i in order]
    for _ in range(200):
        for i in range(len(placed) - 1):
            overlap = gap - (placed[i + 1] - placed[i])
            if overlap > 0:
                placed[i] -= overlap / 2
                placed[i + 1] += overlap / 2
        placed = [min(max(y, low + gap * i), high - gap * (len(placed) - 1 - i)) for i, y in enumerate(placed)]
    result = [0.0] * len(positions)
    for i, y in zip(order, placed, strict=True):
        result[i] = y
    return result


def _panel(axes: Axes, lines: Mapping[str, tuple[list[int], list[float]]], wrong: set[str], ordinary: str) -> None:
    """Lines on logarithmic axes, named at their right ends."""
    ends: list[tuple[str, str, float]] = []
    for name, (sizes, values) in lines.items():
        color, dashes, marker = STYLES.get(name, ("#000000", (0, (5, 2)), ""))
        width = 2.4 if name == "limpet" else 1.4
        axes.plot(
            sizes, values, color=color, linestyle=dashes, marker=marker, markersize=4.5, linewidth=width,
            zorder=3 if name == "limpet" else 2,
        )  # fmt: skip
        label = ordinary if name == "" else f"{name} (wrong)" if name in wrong else name
        ends.append((label, color, values[-1]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    to_axes = axes.transScale + axes.transLimits
    heights = [float(to_axes.transform((1, end))[1]) for _, _, end in ends]
    leader = {"arrowstyle": "-", "linewidth": 0.9, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
    for (label, color, _), at, height in zip(ends, apart(heights, 0.062, -0.02, 1.0), heights, strict=True):
        axes.annotate(
            label, (0.955, height), (1.06, at), xycoords="axes fraction", textcoords="axes fraction", va="center",
            fontsize=8.5, color="#000000", fontweight="bold" if label == "limpet" else "normal",
            arrowprops={**leader, "color": color},
        )  # fmt: skip


def _lines(group: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a group, time over the ordinary pass and peak megabytes, both by method over the batch size."""
    times: dict[str, tuple[list[int], list[float]]] = {}
    peaks: dict[str, tuple[list[int], list[float]]] = {"": ([], [])}
    for point in group["sweep"]:
        peaks[""][0].append(point["batch"])
        peaks[""][1].append(point["baseline"]["peak"] / 1e6)
        for row in point["answers"]:
            if row["ratio"] is None:
                continue
            name = short(row["method"])
            for lines, value in ((times, row["ratio"]), (peaks, row["peak"] / 1e6)):
                sizes, values = lines.setdefault(name, ([], []))
                sizes.append(point["batch"])
                values.append(value)
    peaks.pop("limpet, one batch", None)  # the same memory
    return times, peaks


def draw(groups: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write the picture of the groups that have several batch sizes."""
    with plt.rc_context({"svg.hashsalt": "limpet", "font.size": 9.5}):
        figure, panels = plt.subplots(2, len(groups), figsize=(6.6 * len(groups), 8.4), squeeze=False, sharex="col")
        for column, group in zip(panels.T, groups, strict=True):
            # A method that leaves tensors out, or is off by more than rounding, is not one that does the same work.
            wrong = {
                short(row["method"]) for row in group["answers"]
                if row["failure"] is None and (row["missing"] or (row["error"] or 0.0) > WRONG)
            }  # fmt: skip
            times, peaks = _lines(group)
            _panel(column[0], times, wrong, "")
            _panel(column[1], peaks, wrong, "ordinary pass")
            column[0].axhline(1.0, color="#000000", linewidth=0.8)
            column[0].set_title(group["title"].rsplit(", batch", 1)[0], loc="left", fontweight="bold")
            column[0].set_ylabel("time / ordinary forward and backward")
            column[1].set_ylabel("peak of one call, MB")
            column[1].set_xlabel("batch size, samples")
        figure.suptitle("Exact diagonal Fisher: time and memory over the batch size", x=0.01, ha="left", fontsize=12)
        figure.tight_layout(rect=(0, 0, 1, 0.99), w_pad=2.0)
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(
            partial, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None, dpi=110
        )
        os.replace(partial, path)
        plt.close(figure)
