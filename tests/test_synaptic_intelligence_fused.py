"""Synaptic Intelligence and its relatives within the fused optimizers' own step."""

import pytest
import torch
from torch import nn

import limpet
from limpet.optim import SGD, AdamW
from tolerances import assert_close

PAIRS = {
    "adamw": (lambda p, **o: AdamW(p, lr=0.02, **o), lambda p: torch.optim.AdamW(p, lr=0.02)),
    "sgd": (
        lambda p, **o: SGD(p, lr=0.05, momentum=0.9, **o),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    ),
}


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def tasks(count=3, steps=6):
    generator = torch.Generator().manual_seed(5)
    return [
        [
            (torch.randn(8, 4, generator=generator).double(), torch.randint(3, (8,), generator=generator))
            for _ in range(steps)
        ]
        for _ in range(count)
    ]


def step(model, optimizer, batch):
    optimizer.zero_grad()
    x, y = batch
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("name", PAIRS)
def test_as_in_the_hooks_of_torchs_optimizer(name):
    ours, theirs = PAIRS[name]
    model, twin = network(), network()
    si = limpet.SynapticIntelligence(model, strength=2.0)
    optimizer = ours(model.parameters(), regularizers=[si])
    other = theirs(twin.parameters())
    hooked = limpet.SynapticIntelligence(twin, other, strength=2.0)
    for batches in tasks():
        for batch in batches:
            step(model, optimizer, batch)
            step(twin, other, batch)
        assert si.num_steps == hooked.num_steps == len(batches)
        for key, integral in hooked.integrals.items():
            assert_close(si.integrals[key], integral)
        si.consolidate()
        hooked.consolidate()
    for key, importance in hooked.importances.items():
        assert importance.any()
        assert_close(si.importances[key], importance)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q)


def test_no_parameter_is_copied():
    model = network()
    si = limpet.SynapticIntelligence(model, strength=2.0)
    optimizer = AdamW(model.parameters(), regularizers=[si])
    step(model, optimizer, tasks()[0][0])
    assert not si._previous


def test_hooks_go_on_where_a_fused_optimizer_stopped():
    (batches, *_) = tasks()
    model, twin = network(), network()
    si, hooked = (limpet.SynapticIntelligence(m, strength=2.0) for m in (model, twin))
    fused = SGD(model.parameters(), lr=0.05, regularizers=[si])
    plain, other = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, twin))
    hooked.attach(other)
    for batch in batches[:3]:
        step(model, fused, batch)
    si.attach(plain)
    for batch in batches[3:]:
        step(model, plain, batch)
    for batch in batches:
        step(twin, other, batch)
    for key, integral in hooked.integrals.items():
        assert_close(si.integrals[key], integral)


def test_with_ewc_in_one_step():
    (first, second, _) = tasks()
    model = network()
    ewc = limpet.EWC(model, strength=3.0)
    ewc.consolidate(first)
    si = limpet.SynapticIntelligence(model, strength=2.0)
    optimizer = AdamW(model.parameters(), lr=0.02, regularizers=[ewc, si])
    twin = network()
    their_ewc = limpet.EWC(twin, strength=3.0)
    their_ewc.consolidate(first)
    other = torch.optim.AdamW(twin.parameters(), lr=0.02)
    hooked = limpet.SynapticIntelligence(twin, strength=2.0)
    for batches in (first, second):
        for batch in batches:
            step(model, optimizer, batch)
            other.zero_grad()
            nn.functional.cross_entropy(twin(batch[0]), batch[1]).backward()
            hooked.before_step()
            their_ewc.add_penalty_grad_()
            other.step()
            hooked.after_step()
        si.consolidate()
        hooked.consolidate()
    for key, importance in hooked.importances.items():
        assert_close(si.importances[key], importance)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p, q)


def test_two_bookkeepings_of_one_step_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si = limpet.SynapticIntelligence(model, optimizer, strength=1.0)
    fused = SGD(model.parameters(), lr=0.1, regularizers=[si])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="SynapticIntelligence is attached to an optimizer"):
        step(model, fused, tasks()[0][0])
    rwalk = limpet.RWalk(model, strength=1.0)
    fused = SGD(model.parameters(), lr=0.1, regularizers=[rwalk])
    with pytest.raises(RuntimeError, match="RWalk keeps more than path integrals"):
        step(model, fused, tasks()[0][0])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
