"""The picture of a search: accuracy over strength."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from limpet.scenarios._files import replacing
from limpet.scenarios.plots import _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from limpet.strength.result import StrengthSuggestion

_CURVES = (("retained", "earlier tasks", "#0072B2"), ("new", "new task", "#E69F00"), ("score", "mean", "#333333"))


def draw(suggestion: StrengthSuggestion, path: Path | None) -> Figure:
    """Draw each strength's last trial; the line joins those that were trained in full."""
    last = sorted({trial.strength: trial for trial in suggestion.table}.values(), key=lambda trial: trial.strength)
    full = suggestion.trial.rung
    figure, axes = _figure(6.4, 3.6)
    axes.set_xscale("log")
    axes.axvline(suggestion.best, color="#56B4E9", alpha=0.35, linewidth=6)
    for name, label, color in _CURVES:
        style = {"color": color, "linestyle": "--" if name == "score" else "-"}
        known = [trial for trial in last if not trial.diverged]
        done = [trial for trial in known if trial.rung == full]
        axes.plot([t.strength for t in known], [100 * getattr(t, name) for t in known], alpha=0.3, lw=1, **style)
        for trials, size in ((known, 2.5), (done, 6)):
            points = [100 * getattr(trial, name) for trial in trials]
            axes.plot([trial.strength for trial in trials], points, "o", color=color, markersize=size)
        axes.plot([t.strength for t in done], [100 * getattr(t, name) for t in done], lw=1.8, label=label, **style)
    for trial in last:
        if trial.diverged:
            axes.plot([trial.strength], [0.03], "x", color="#D55E00", transform=axes.get_xaxis_transform())
    axes.set_xlabel("strength")
    axes.set_ylabel("accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"best strength: {suggestion.best:.3g}", loc="left")
    if path is not None:
        with replacing(path) as stream:
            figure.savefig(stream, format=path.suffix.removeprefix("."))
    return figure
