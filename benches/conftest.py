"""`pytest benches --benchmark-only` prints one table of ratios; `--results DIR` also writes it as JSON and Markdown."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compare import Row, interleave, summarize
from limpet import _core

THREADS = 2
ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="DIR", help="write the table of ratios to DIR as cpu.json and cpu.md")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Row]:
    """Time candidates in turns and keep the row; ``ours`` also goes to pytest-benchmark's own table."""

    def run(
        what: str,
        against: str,
        target: str,
        calls: dict[str, Callable[[], Any]] | None = None,
        *,
        seconds: dict[str, list[float]] | None = None,  # already measured, in another process
        **options: Any,
    ) -> Row:
        once = benchmark.disabled
        if seconds is None:
            seconds = interleave(calls or {}, once=once)
        row = summarize(what, against, target, seconds, **options)
        request.config.stash[ROWS].append(row)
        benchmark.extra_info.update(row.as_dict())
        benchmark.pedantic(calls["ours"] if calls else lambda: None, rounds=1 if once else 3)
        return row

    return run


@pytest.fixture
def in_earnest(benchmark: Any) -> bool:
    """Whether times count: when benches run as tests, what only adds minutes (compiling peers) is left out."""
    return not benchmark.disabled


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _machine() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "allocator": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")} or "glibc defaults",
        **_core.build_info(),
    }


def _table(rows: list[Row]) -> list[str]:
    lines = ["| what | against | ratio | quartiles | target | ms | peers, same ratio | notes |", "|" + "---|" * 8]
    for row in rows:
        peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row.peers.items())
        notes = ", ".join(f"{name} {value}" for name, value in row.notes.items())
        lines.append(
            f"| {row.what} | {row.against} | **{row.ratio:.2f}** | {row.quartiles[0]:.2f}-{row.quartiles[1]:.2f} "
            f"| {row.target} | {row.milliseconds:.2f} | {peers} | {notes} |"
        )
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    terminalreporter.section("ratios (median of interleaved rounds)")
    for line in _table(rows):
        terminalreporter.write_line(line)
    folder = config.getoption("--results")
    if folder:
        machine = _machine()
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        facts = "\n".join(f"- {name}: {value}" for name, value in machine.items())
        for name, text in (
            ("cpu.json", json.dumps({"machine": machine, "rows": [r.as_dict() for r in rows]}, indent=1) + "\n"),
            ("cpu.md", f"# Ratios on one machine\n\n{facts}\n\n" + "\n".join(_table(rows)) + "\n"),
        ):
            beside = target / (name + ".tmp")
            beside.write_text(text)
            os.replace(beside, target / name)
