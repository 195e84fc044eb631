"""Docstrings and the README are executed."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import limpet

README = Path(__file__).parent.parent / "README.md"
REPLAY = README.parent / "docs" / "replay.md"
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(limpet.__path__, "limpet.")
    if not m.name.startswith(("limpet.triton_kernels", "limpet._core"))
)


@pytest.mark.parametrize("name", ["limpet", *MODULES])
def test_docstrings(name):
    module = importlib.import_module(name)
    failures, _ = doctest.testmod(module, extraglobs={"torch": importlib.import_module("torch")})
    assert failures == 0


def test_every_public_function_has_an_example():
    missing = [
        f"{module.__name__}.{name}"
        for module in (limpet, limpet.ops)
        for name in module.__all__
        if callable(getattr(module, name)) and ">>>" not in (getattr(module, name).__doc__ or "")
    ]
    assert missing == ["limpet.DiagonalFisher"]  # made by diagonal_fisher, whose example shows it


def test_the_readme_runs():
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
    ewc = scope["ewc"]
    assert isinstance(ewc, limpet.EWC)
    assert ewc.num_tasks == 5


def test_the_methods_of_replay_run():
    _, section = REPLAY.read_text().split("\n## Methods\n")
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], flags=re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(REPLAY), "exec"), scope)


def test_the_page_on_progressive_networks_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    blocks = re.findall(
        r"```python\n(.*?)```", (README.parent / "docs" / "progressive.md").read_text(), flags=re.DOTALL
    )
    for block in blocks:
        exec(compile(block, "progressive.md", "exec"), scope)
    assert (tmp_path / "feeds.png").exists()
    assert scope["net"].tasks == ["digits", "letters"]


def test_the_readme_shows_the_two_commands():
    text = README.read_text()
    assert "make demo" in text
    assert "make test" in text
