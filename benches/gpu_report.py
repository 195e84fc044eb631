"""A report as JSON and as Markdown: the machine, then tables of rows. Standard library only."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

Cell = str | float | int | None


@dataclass
class Table:
    """Rows under the same columns; a value that was not measured is ``None``."""

    title: str
    columns: Sequence[str]
    rows: list[Sequence[Cell]] = field(default_factory=list)


@dataclass
class Report:
    """What was measured, where, and with what."""

    title: str
    machine: Mapping[str, Cell]
    tables: list[Table] = field(default_factory=list)

    def write(self, folder: Path, stem: str) -> None:
        """Write ``stem.json`` and ``stem.md``; each appears whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("json", json.dumps(asdict(self), indent=1) + "\n"), ("md", self.markdown())):
            partial = folder / f".{stem}.{suffix}.partial"
            partial.write_text(text)
            os.replace(partial, folder / f"{stem}.{suffix}")

    def markdown(self) -> str:
        """The report as Markdown tables."""
        lines = [f"# {self.title}", "", *(f"- {key}: {_cell(value)}" for key, value in self.machine.items())]
        for table in self.tables:
            lines += ["", f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
            lines += [_row([_cell(value) for value in row]) for row in table.rows]
        return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: Cell) -> str:
    if value is None:
        return "not measured"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
