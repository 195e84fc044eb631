"""What `make fisher-peers` measures, on a tiny model and without any other package."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fisher_peers
from cases import mlp
from peers.measure import answer, best_factor, error_of, exact, measure
from peers.methods import Method, Ready, limpet_call, sample_loop, vmapped
from peers.picture import apart
from peers.problems import MEASURED, Problem, hard_cases, smooth_samples
from peers.report import page, verdict

PLAIN = [
    Method("limpet, 3 batches a call", limpet_call(3), "limpet"),
    Method("loop of batch size 1", sample_loop),
    Method("vmap(grad)", vmapped(None)),
    Method("vmap(grad), chunks of 2", vmapped(2)),
]


@pytest.fixture
def problem() -> Problem:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    return Problem(model, torch.randn(5, 4), torch.randint(5, (5,)))


def broken(problem: Problem) -> Ready:
    def run() -> dict[str, Tensor]:
        raise NotImplementedError("not for Tanh\nand more lines")

    return Ready(run)


def absent(problem: Problem) -> Ready:
    import no_such_package  # noqa: F401

    return Ready(dict)


def test_the_exact_answer_is_the_mean_of_squared_gradients(problem: Problem) -> None:
    want = exact(problem)
    total = {name: torch.zeros_like(value) for name, value in want.items()}
    model = problem.model().double()
    for x, y in zip(problem.inputs.double(), problem.targets, strict=True):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[None]), y[None]).backward()
        for name, p in model.named_parameters():
            total[name] += p.grad.square() / problem.size
    for name, value in want.items():
        torch.testing.assert_close(value, total[name])


@pytest.mark.parametrize("method", PLAIN, ids=lambda method: method.name)
def test_plain_ways_are_right(method: Method, problem: Problem) -> None:
    row, ready = answer(method, problem, exact(problem))
    assert ready is not None
    assert row.right, row
    assert row.tensors == 4


def test_error_tells_wrong_missing_and_misshapen_tensors(problem: Problem) -> None:
    want = exact(problem)
    assert error_of(want, 1.0, want) == (0.0, "0.weight", ())
    wrong = {**want, "2.bias": want["2.bias"] * 1.5}
    error, worst, missing = error_of(wrong, 1.0, want)
    assert error == pytest.approx(0.5)
    assert (worst, missing) == ("2.bias", ())
    del wrong["2.bias"]
    assert error_of(wrong, 1.0, want)[2] == ("2.bias",)
    assert error_of({**want, "2.bias": torch.zeros(1)}, 1.0, want)[0] == math.inf
    assert error_of({**want, "2.bias": want["2.bias"] * math.nan}, 1.0, want)[0] == math.inf
    assert error_of({}, 1.0, want)[:2] == (None, None)


def test_the_best_factor_undoes_any_factor(problem: Problem) -> None:
    want = exact(problem)
    assert best_factor({name: value / 7 for name, value in want.items()}, want) == pytest.approx(7)


def test_failures_are_in_the_table(problem: Problem) -> None:
    methods = [*PLAIN[:2], Method("Broken", broken), Method("Absent", absent)]
    group = measure(problem, methods, 0.0, exact(problem))
    rows = {row["method"]: row for row in group["answers"]}
    assert rows["Broken"]["failure"] == "NotImplementedError: not for Tanh"
    assert verdict(rows["Broken"]) == "refuses"
    assert rows["Absent"]["failure"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert verdict(rows["Absent"]) == "fails"
    assert rows["limpet, 3 batches a call"]["ratio"] > 0
    assert rows["limpet, 3 batches a call"]["peak"] > 0
    environment = {
        "machine": {"cpu": "some", "cpus": 2, "threads": 1}, "core": None, "versions": {"torch": "2"},
        "allocator": "defaults", "commit": None,
    }  # fmt: skip
    text = page({"tiny": {"title": "Tiny", "environment": environment, **group}, "big": {"failure": "no memory"}})
    assert "| Broken |  |  |  |  |  | refuses |" in text
    assert "- Broken: `NotImplementedError: not for Tanh`" in text
    assert "Not measured: no memory." in text


def test_a_wrong_answer_is_called_wrong(problem: Problem) -> None:
    def doubled(problem: Problem) -> Ready:
        ready = sample_loop(problem)
        return Ready(ready.run, 2 / problem.size)

    row, _ = answer(Method("Doubled", doubled), problem, exact(problem))
    assert not row.right
    assert verdict(row.as_dict()) == "**wrong by 1.00**"


def test_limpet_is_right_or_refuses_in_every_hard_case() -> None:
    for case in hard_cases().values():
        row, _ = answer(Method("limpet", limpet_call(1)), case, exact(case) if case.exists else None)
        assert row.right if case.exists else row.refused, row


def test_batches_stay_away_from_kinks() -> None:
    torch.manual_seed(0)
    model = mlp(3, 8, 2)
    inputs, targets = smooth_samples(model, lambda n: (torch.randn(n, 3), torch.arange(n)), 16, margin=1e-2)
    assert inputs.shape == (16, 3)
    assert targets.shape == (16,)
    assert model[1](inputs).abs().min() > 0.9e-2
    assert set(MEASURED) == {"mlp", "resnet18", "encoder", "gpt2"}


def test_labels_do_not_overlap() -> None:
    placed = apart([0.5, 0.5, 0.1, 0.51, 1.4], 0.1, 0.0, 1.0)
    assert placed[2] == pytest.approx(0.1)
    ordered = sorted(placed)
    assert ordered[-1] <= 1.0 + 1e-9
    assert all(b - a >= 0.1 - 1e-6 for a, b in itertools.pairwise(ordered))


def test_the_command_measures_hard_cases_and_writes_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_peers, "methods", lambda batches, chunk: [*PLAIN[:2], Method("Broken", broken)])
    monkeypatch.setattr(fisher_peers, "run_apart", lambda group, arguments: fisher_peers.run_group(group, 0.0, 0.0))
    command = ["--results", str(tmp_path / "kept"), "--docs", str(tmp_path), "--threads", "1", "--models"]
    assert fisher_peers.main([*command, "hard"]) == 0
    groups = json.loads((tmp_path / "kept" / "fisher-peers.json").read_text())
    assert list(groups) == ["hard"]
    before = (tmp_path / "fisher-peers.md").read_text()
    assert "| limpet, 3 batches a call | right" in before
    assert "**answers all the same** |" in before  # the loop, where samples interact
    assert fisher_peers.main(command) == 0  # writes again from what was kept
    assert (tmp_path / "fisher-peers.md").read_text() == before


def test_a_group_whose_process_ends_is_reported(tmp_path: Path) -> None:
    command = ["--results", str(tmp_path), "--docs", str(tmp_path), "--models", "hard", "--limit", "0.01"]
    assert fisher_peers.main(command) == 1
    assert "not done after 0 s" in (tmp_path / "fisher-peers.md").read_text()
