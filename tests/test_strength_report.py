"""What suggest_strength refuses, what its result shows, and that it works for EWC on digits."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import limpet
from limpet import EWC, suggest_strength
from limpet.scenarios import datasets
from limpet.strength import StrengthSuggestion, Trial

ROOT = Path(__file__).parent.parent
FULL = os.environ.get("LIMPET_DATA")


def train(model, ewc):
    for _ in range(4):
        yield


def evaluate(model):
    return 0.5, 0.5


def consolidated():
    ewc = EWC(nn.Linear(2, 2), strength=1.0)
    ewc.consolidate([(torch.randn(4, 2), torch.randint(2, (4,)))])
    return ewc


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"regularizer": nn.Linear(1, 1)}, TypeError, "regularizer must have a strength and a model"),
        ({"train": None}, TypeError, "train must be callable, got NoneType None"),
        ({"evaluate": 3}, TypeError, "evaluate must be callable, got int 3"),
        ({"progress": 3}, TypeError, "progress must be callable, got int 3"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got float 1.5"),
        ({"rungs": 0}, ValueError, "rungs must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"strengths": 1.0}, TypeError, "strengths must be a sequence of numbers, got float 1.0"),
        ({"strengths": []}, ValueError, "strengths must be one or more numbers above 0, got list"),
        ({"strengths": [1.0, 0.0]}, ValueError, "strengths must be one or more numbers above 0"),
        ({"strengths": [1.0, float("inf")]}, ValueError, r"strengths\[1\] must be finite, got inf"),
        ({"strengths": ["1"]}, TypeError, r"strengths\[0\] must be a number, got str '1'"),
        ({"regularizer": EWC(nn.Linear(1, 1), 1.0)}, ValueError, "strengths must be given .* consolidated"),
        ({"train": lambda model, ewc: None}, TypeError, "train must be a generator function: it must yield"),
        ({"train": lambda model, ewc: iter(())}, ValueError, "train must yield after each step, but ended"),
        ({"evaluate": lambda model: 0.5}, TypeError, r"evaluate must return two accuracies, .* got float 0\.5"),
        ({"evaluate": lambda model: (0.5, 97.0)}, ValueError, r"accuracies in \[0, 1\], got new = 97\.0"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"regularizer": consolidated(), "train": train, "evaluate": evaluate, "steps": 4} | change
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        suggest_strength(**arguments)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def found():
    table = [Trial(1, 10.0**k, 5, 0.5 + 0.1 * k, 0.9 - 0.1 * k) for k in range(4)]
    table += [
        Trial(1, 1e4, 5, float("nan"), float("nan")),
        Trial(2, 10.0, 10, 0.75, 1.0),
        Trial(2, 100.0, 10, 0.5, 1.0),
    ]
    return StrengthSuggestion(10.0, tuple(table))


def test_it_prints_as_a_table(found):
    assert repr(found) == "StrengthSuggestion(best=10, retained=0.7500, new=1.0000, strengths=5)"
    lines = str(found).splitlines()
    assert lines[0].split() == ["rung", "strength", "steps", "retained", "new", "score"]
    assert lines[5].split() == ["1", "1e+04", "5", "-", "-", "-", "diverged"]
    assert lines[6].split() == ["2", "10", "10", "0.7500", "1.0000", "0.8750", "<-", "best"]
    assert str(found).count("best") == 1


def test_it_is_drawn(found, tmp_path):
    figure = found.plot()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert "10" in axes.get_title(loc="left")
    bold = {line.get_label(): line.get_ydata() for line in axes.lines if not line.get_label().startswith("_")}
    assert list(bold["earlier tasks"]) == [75.0, 50.0]
    assert list(bold["new task"]) == [100.0, 100.0]
    assert len(bold["diverged"]) == 1
    found.plot(tmp_path / "s.png")
    found.plot(str(tmp_path / "s.svg"))
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "s.svg").read_text()
    with pytest.raises(ValueError, match="nonsense"):
        found.plot(tmp_path / "s.nonsense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.png", "s.svg"]


def example():
    spec = importlib.util.spec_from_file_location("choose_strength", ROOT / "examples" / "choose_strength.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(dataset, accuracy):
    """For each kind of Fisher information its own strength, and as much is kept and learnt with either."""
    torch.set_num_threads(1)  # small products: more threads wait more than they compute
    best = {}
    for labels in ("data", "batched"):
        suggestion, tested = example().choose(dataset, labels)
        best[labels] = suggestion.best
        (retained, new), (forgotten, _) = tested
        assert retained > accuracy
        assert new > accuracy
        assert retained > forgotten + 0.1
    assert 10 <= best["batched"] / best["data"] <= 1000  # the square of a mean over 128 samples is about 1/128


def test_the_two_scales_of_the_fisher_information_on_a_subset():
    check(datasets.load("mnist-subset"), 0.85)


@pytest.mark.slow
@pytest.mark.skipif(FULL is None, reason="LIMPET_DATA does not name a folder with the full data sets")
def test_the_two_scales_of_the_fisher_information():
    check(datasets.load("mnist", FULL), 0.9)


def test_the_page_runs(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)  # it draws a picture
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "strength.md").read_text(), flags=re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(block, "strength.md", "exec"), scope)
    assert isinstance(scope["ewc"], limpet.EWC)
    assert scope["ewc"].strength == scope["suggestion"].best > 0
    assert (tmp_path / "strength.png").exists()
