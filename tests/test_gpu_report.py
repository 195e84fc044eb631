"""The report of `make gpu-check`, on made-up numbers, and how a step's outcome is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parent.parent / "benches"


@pytest.fixture(autouse=True)
def _benches_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHES))


def test_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    from gpu_report import Report, Table

    table = Table("Quadratic | pass", ["model", "ms", "launches", "compiled ms"], [["GPT-2", 0.5678, 2, None]])
    Report("GPU benches", {"device": "some GPU", "memory GiB": 139.8}, [table]).write(tmp_path / "new", "gpu")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["gpu.json", "gpu.md"]
    read = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert read["tables"][0]["rows"] == [["GPT-2", 0.5678, 2, None]]
    markdown = (tmp_path / "new" / "gpu.md").read_text()
    assert "- memory GiB: 140\n" in markdown
    assert "| GPT-2 | 0.568 | 2 | not measured |" in markdown


@pytest.mark.parametrize(
    ("code", "outcome"),
    [("pass", "passed"), ("raise SystemExit(3)", "failed (3)"), ("while True: pass", "out of time")],
)
def test_outcome_of_a_step(code: str, outcome: str, tmp_path: Path) -> None:
    from gpu_check import Step, run

    with open(tmp_path / "log", "w") as log:
        steps = [Step("step", [sys.executable, "-c", code], 10, {}), Step("other", ["no-such-program"], 10, {})]
        found = run(steps, 1.5 if "True" in code else 10, log)
    assert [told for told, _ in found] == [outcome, "absent"]
    assert [line[:8] for line in (tmp_path / "log").read_text().splitlines() if line[:3] == "==="] == [
        "=== step",
        "=== othe",
    ]


def test_benches_refuse_a_machine_without_a_gpu(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    run = subprocess.run(
        [sys.executable, str(BENCHES / "gpu.py"), "--results", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert "no CUDA device" in run.stderr
