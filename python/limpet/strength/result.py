"""What a search for a strength found: a table of trials, and a picture of it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Trial:
    """One strength in one rung: how long it had been trained, and what it then knew."""

    rung: int  # from 1
    strength: float
    steps: int  # of training in all, with those of the rungs before
    retained: float  # accuracy on the earlier tasks, in [0, 1]; NaN where training diverged
    new: float  # accuracy on the new task, in [0, 1]; NaN where training diverged

    @property
    def score(self) -> float:
        """The mean of the two accuracies."""
        return 0.5 * (self.retained + self.new)

    @property
    def diverged(self) -> bool:
        """Whether a parameter or an accuracy was not finite."""
        return math.isnan(self.score)


@dataclass(frozen=True, repr=False)
class StrengthSuggestion:
    """The strength that :func:`limpet.suggest_strength` found best, and every trial on the way.

    ``print`` shows the table.
    """

    best: float
    table: tuple[Trial, ...]  # rung by rung, and in a rung from weak to strong

    @property
    def trial(self) -> Trial:
        """The best strength's last trial, after a full training."""
        return [trial for trial in self.table if trial.strength == self.best][-1]

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw retained and new accuracy over strength.

        Large dots had a full training; small ones were left behind after a part of it.

        Args:
            path: also write the picture here, as its suffix says (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: matplotlib knows no format with the suffix of ``path``.
        """
        from limpet.strength.picture import draw

        return draw(self, None if path is None else Path(path))

    def __repr__(self) -> str:
        last = self.trial
        strengths = len({trial.strength for trial in self.table})
        return (
            f"StrengthSuggestion(best={self.best:g}, retained={last.retained:.4f}, new={last.new:.4f}, "
            f"strengths={strengths})"
        )

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("rung", "strength", "steps", "retained", "new", "score", "")]
        rows += [_row(trial, "<- best" if trial is self.trial else "") for trial in self.table]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(_aligned(row, widths) for row in rows)


def _row(trial: Trial, note: str) -> tuple[str, ...]:
    """A trial's cells."""
    where = (f"{trial.rung}", f"{trial.strength:.3g}", f"{trial.steps}")
    if trial.diverged:
        return (*where, "-", "-", "-", "diverged")
    return (*where, f"{trial.retained:.4f}", f"{trial.new:.4f}", f"{trial.score:.4f}", note)


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    """One line: numbers to the right, the note to the left."""
    cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths[:-1], strict=True)]
    return "  ".join([*cells, row[-1]]).rstrip()
