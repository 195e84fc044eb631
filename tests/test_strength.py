"""suggest_strength on problems whose best strength is known."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limpet import EWC, suggest_strength


def protecting(importance, strength=1.0):
    """One weight, anchored at 0 with a given importance."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    ewc = EWC(model, strength)
    tensors = {"weight": torch.full((1, 1), importance, dtype=torch.float64)}
    ewc.load_state_dict(
        {**ewc.state_dict(), "num_tasks": 1, "anchors": {"weight": torch.zeros(1, 1)}, "importances": tensors}
    )
    return ewc


def towards_one(curvature, counter=None):
    """A new task of loss ``curvature / 2 (w - 1)^2``: each step goes half the way to the minimum with the penalty."""

    def train(model, ewc):
        while True:
            pull = ewc.strength * ewc.importances["weight"]
            with torch.no_grad():
                model.weight.lerp_(curvature / (curvature + pull), 0.5)
            if counter is not None:
                counter[ewc.strength] = counter.get(ewc.strength, 0) + 1
            yield

    return train


def distances(model):
    """Best in the middle between 0, where the old task is best, and 1, where the new one is."""
    weight = model.weight.item()
    return 1 - weight**2, 1 - (1 - weight) ** 2


@settings(max_examples=30)
@given(importance=st.integers(-9, 6), curvature=st.integers(-3, 3), rungs=st.integers(1, 4))
def test_the_strength_is_the_ratio_of_the_curvatures(importance, curvature, rungs):
    found = suggest_strength(
        protecting(10.0**importance), towards_one(10.0**curvature), distances, steps=200, rungs=rungs
    )
    assert found.best == pytest.approx(10.0 ** (curvature - importance))
    assert found.trial.retained == pytest.approx(0.75)
    assert found.trial.new == pytest.approx(0.75)
    assert found.trial.steps == 200


def test_each_rung_trains_half_as_many_for_twice_as_long():
    steps, seen = {}, []
    strengths = [10.0**k for k in range(-4, 4)]
    found = suggest_strength(
        protecting(1.0), towards_one(1.0, steps), distances, steps=40, strengths=strengths,
        progress=lambda done, planned: seen.append((done, planned)),
    )  # fmt: skip
    assert found.best == 1.0
    assert [sum(trial.rung == rung for trial in found.table) for rung in (1, 2, 3)] == [8, 4, 3]
    assert [{trial.steps for trial in found.table if trial.rung == rung} for rung in (1, 2, 3)] == [{10}, {20}, {40}]
    assert sum(steps.values()) == 8 * 10 + 4 * 10 + 3 * 20
    assert max(steps.values()) == 40
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[0] == (1, 180)
    assert seen[-1] == (180, 180)


def test_trainings_go_on_and_are_ended():
    started, ended = [], []

    def train(model, ewc):
        started.append(ewc.strength)
        try:
            yield from towards_one(1.0)(model, ewc)
        finally:
            ended.append(ewc.strength)

    found = suggest_strength(protecting(1.0), train, distances, steps=40, strengths=[0.01, 0.1, 1.0, 10.0, 100.0])
    assert found.best == 1.0
    assert sorted(started) == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert sorted(ended) == sorted(started)


class Held:
    """Not from limpet: it has the two attributes that are asked for."""

    def __init__(self):
        self.model = nn.Module()
        self.model.steps = nn.Parameter(torch.zeros(()))
        self.model.decade = nn.Parameter(torch.zeros(()))
        self.strength = 0.0


def count(model, held):
    model.decade.data.fill_(math.log10(held.strength))
    while True:
        model.steps.data.add_(1)
        yield


def best_at(decade_by_steps):
    def evaluate(model):
        distance = model.decade.item() - decade_by_steps[int(model.steps)]
        return 1 / (1 + distance**2), 1.0

    return evaluate


GRID = [10.0**k for k in range(9)]


def test_a_best_strength_that_moves_as_training_goes_on_is_followed():
    found = suggest_strength(Held(), count, best_at({2: 2, 4: 3, 8: 6}), steps=8, strengths=GRID)
    assert found.best == 1e6
    assert {t.strength for t in found.table if t.rung == 3} == {1e2, 1e3, 1e4, 1e5, 1e6, 1e7}
    assert all(trial.steps == 8 for trial in found.table if trial.rung == 3)  # those that joined too


def test_the_grid_goes_on_where_its_best_is_at_an_end():
    found = suggest_strength(Held(), count, best_at({2: 3, 4: 3, 8: 3}), steps=8, strengths=[1.0, 10.0])
    assert found.best == 1e3
    assert max(t.strength for t in found.table) == 1e4  # it has been compared with both neighbours
    assert suggest_strength(Held(), count, best_at({8: 1}), steps=8, strengths=[1], rungs=1).best == 10.0


def test_a_best_strength_at_an_end_of_all_is_told():
    with pytest.warns(UserWarning, match=r"the best strength, 0\.0625, is the weakest of all"):
        found = suggest_strength(Held(), count, best_at({8: -2}), steps=8, strengths=[2.0, 1.0], rungs=1)
    assert [t.strength for t in found.table] == [0.0625, 0.125, 0.25, 0.5, 1.0, 2.0]  # four have joined
    with pytest.warns(UserWarning, match="is the strongest of all"):
        found = suggest_strength(Held(), count, best_at({8: 400}), steps=8, strengths=[1e300, 1e306], rungs=1)
    assert found.best == 1e306  # the next one is no number


@pytest.mark.filterwarnings("ignore:the best strength")
def test_a_regularizer_that_does_nothing_is_told():
    with pytest.warns(UserWarning, match="no strength made a difference in the first rung"):
        suggest_strength(Held(), count, lambda model: (0.5, 0.5), steps=8, strengths=GRID)


@pytest.mark.filterwarnings("ignore:the best strength", "ignore:no strength made a difference")
def test_ties_go_to_the_weaker_at_the_end_and_to_the_stronger_before():
    assert suggest_strength(Held(), count, lambda model: (0.5, 0.5), steps=8, strengths=GRID, rungs=1).best == 1.0
    found = suggest_strength(Held(), count, lambda model: (0.5, 0.5), steps=8, strengths=GRID, rungs=2)
    assert found.best == 1e4
    assert min(t.strength for t in found.table if t.rung == 2) == 1e4


def diverging_above(bound):
    def train(model, held):
        for _ in count(model, held):
            if held.strength > bound and model.steps == 4:
                model.decade.data.fill_(math.nan)
            yield

    return train


def test_what_diverges_is_dropped_and_said_so(caplog):
    with caplog.at_level("WARNING", "limpet"):
        found = suggest_strength(Held(), diverging_above(1e3), best_at({2: 3, 4: 5, 8: 5}), steps=8, strengths=GRID)
    assert found.best == 1e3
    diverged = {trial.strength for trial in found.table if trial.diverged}
    assert diverged == {1e4, 1e5}
    assert "the training with strength 10000 diverged; it is dropped" in caplog.text
    assert str(found).count("diverged") == len([trial for trial in found.table if trial.diverged]) == 2
    assert "<- best" in str(found)
    with pytest.raises(RuntimeError, match="diverged with every strength"):
        suggest_strength(Held(), diverging_above(0), best_at({2: 3}), steps=8, strengths=GRID)
    with pytest.raises(RuntimeError, match="diverged with every strength"):
        suggest_strength(Held(), count, lambda model: (math.nan, 1.0), steps=8, strengths=GRID)


def noisy(model, ewc):
    """Draws from every generator, by amounts that differ between the strengths."""
    for _ in range(20):
        noise = torch.rand(int(1 + 3 / ewc.strength)).sum() + random.random() + np.random.rand()  # noqa: NPY002
        with torch.no_grad():
            model.weight.add_(0.02 * float(noise) / (1 + ewc.strength))
        yield


@pytest.mark.filterwarnings("ignore:the best strength")
def test_the_same_seed_gives_the_same_table():
    def search(**options):
        return suggest_strength(protecting(1.0), noisy, lambda model: (1.0, float(model.weight.clamp(0, 1))), **options)

    options = {"steps": 20, "strengths": [0.1, 1.0, 10.0, 100.0]}
    one, again, other = (search(**options, seed=seed) for seed in (0, 0, 1))
    alone = search(steps=20, strengths=[0.1], rungs=1)
    assert one.table == again.table
    assert one.table != other.table
    full = {trial.strength: trial.new for trial in one.table if trial.rung == 3}
    assert next(trial.new for trial in alone.table if trial.strength == 0.1) == full[0.1]  # whoever else is searched


def generators():
    """Where torch's, NumPy's and Python's generators stand."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


@pytest.mark.filterwarnings("ignore:the best strength", "ignore:no strength made a difference")
def test_everything_comes_back_untouched():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
    ewc = EWC(model, strength=7.0)
    data = [(torch.randn(8, 3), torch.randint(2, (8,)))]
    model[1].eval()
    ewc.consolidate(data)
    before = copy.deepcopy((model.state_dict(), ewc.state_dict(), [module.training for module in model.modules()]))
    random_before = generators()
    modes = []

    def train(mine, regularizer):
        assert regularizer.model is mine is not model
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.1)
        for _ in range(4):
            modes.append([module.training for module in mine.modules()])
            optimizer.zero_grad()
            nn.functional.cross_entropy(mine(data[0][0]), data[0][1]).backward()
            regularizer.add_penalty_grad_()
            optimizer.step()
            yield

    def evaluate(mine):
        assert not any(module.training for module in mine.modules())
        assert not mine(data[0][0]).requires_grad
        mine.train()  # whatever is done here, training goes on in its own modes
        return 0.5, torch.rand(()).item()

    suggest_strength(ewc, train, evaluate, steps=4)
    assert all(mode == before[2] for mode in modes)
    assert all(param.grad is None for param in model.parameters())
    assert [module.training for module in model.modules()] == before[2]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert ewc.strength == 7.0
    for kind in ("anchors", "importances"):
        for name, tensor in ewc.state_dict()[kind].items():
            assert torch.equal(tensor, before[1][kind][name])
    assert generators() == random_before


def test_a_yield_inside_of_a_mode_is_refused():
    def train(model, held):
        with torch.no_grad():
            yield

    with pytest.raises(RuntimeError, match="train must yield outside of blocks that change torch's modes"):
        suggest_strength(Held(), train, best_at({}), steps=8, strengths=GRID)
    assert torch.is_grad_enabled()
