"""The picture of what a column reads: a heat map of points over columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from limpet.scenarios._files import replacing
from limpet.scenarios.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from limpet.methods.progressive.sensitivity import LateralSensitivity


def draw(found: LateralSensitivity, path: Path | None) -> Figure:
    """Draw the shares, each with its number."""
    shares = 100 * found.shares
    rows, columns = shares.shape
    figure, axes = new_figure(2.6 + 0.75 * columns, 1.6 + 0.55 * rows)
    axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for row in range(rows):
        for column in range(columns):
            value = float(shares[row, column])
            color = "white" if value < 60 else "black"
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=color)
    axes.set_xticks(range(columns), [*map(str, found.tasks[:-1]), f"{found.task} (own)"])
    axes.set_yticks(range(rows), found.points)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("features of column")
    axes.set_ylabel("into point")
    axes.set_title(f"what the column of {found.task} reads (%), {found.measure}", loc="left")
    if path is not None:
        with replacing(path) as stream:
            figure.savefig(stream, format=path.suffix.removeprefix("."))
    return figure
