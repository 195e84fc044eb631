"""The picture of a search: accuracy over strength."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from limpet.scenarios._files import replacing
from limpet.scenarios.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from limpet.strength.result import StrengthSuggestion

_CURVES = (
    ("retained", "earlier tasks", "#0072B2", "-"),
    ("new", "new task", "#E69F00", "-"),
    ("score", "mean", "#333333", "--"),
)


def draw(suggestion: StrengthSuggestion, path: Path | None) -> Figure:
    """Draw the curves of each rung, the last one's boldly, and mark the best strength."""
    figure, axes = new_figure(6.4, 3.6)
    axes.set_xscale("log")
    axes.axvline(suggestion.best, color="#56B4E9", alpha=0.35, linewidth=6)
    full = suggestion.trial.rung
    for rung in range(1, full + 1):
        trials = [trial for trial in suggestion.table if trial.rung == rung and not trial.diverged]
        strengths = [trial.strength for trial in trials]
        for name, label, color, dashes in _CURVES:
            values = [100 * getattr(trial, name) for trial in trials]
            if rung == full:
                axes.plot(strengths, values, dashes, marker="o", markersize=5, linewidth=1.8, color=color, label=label)
            else:
                axes.plot(strengths, values, dashes, linewidth=1, color=color, alpha=0.15 + 0.3 * rung / full)
    diverged = [trial.strength for trial in suggestion.table if trial.diverged]
    if diverged:
        at = [0.03] * len(diverged)  # of the axes' height
        axes.plot(diverged, at, "x", color="#D55E00", label="diverged", transform=axes.get_xaxis_transform())
    axes.set_xlabel("strength")
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=4)
    axes.set_title(f"best strength {suggestion.best:.3g}; pale: after a part of the steps", loc="left")
    if path is not None:
        with replacing(path) as stream:
            figure.savefig(stream, format=path.suffix.removeprefix("."))
    return figure
