"""Synaptic Intelligence saved and resumed, over processes, and with bad input."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from limpet import SynapticIntelligence
from saved_states import save_with_safetensors, save_with_torch
from si_training import backward, mlp, tasks
from tolerances import assert_close


def train(model, optimizer, batches):
    for batch in batches:
        backward(model, batch, optimizer)
        optimizer.step()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert value.keys() == b[key].keys(), key
            assert all(torch.equal(value[name], b[key][name]) for name in value), key
        else:
            assert value == b[key], key


def trained(steps=4, num_tasks=1, optimizer=torch.optim.Adam, **options):
    model = mlp(torch.float32)
    made = optimizer(model.parameters(), lr=0.02)
    si = SynapticIntelligence(model, made, strength=1.0, **options)
    for k, batches in enumerate(tasks(num_tasks, steps, torch.float32)):
        train(model, made, batches)
        if k + 1 < num_tasks:
            si.consolidate()
    return model, made, si


# --- state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_with_torch, save_with_safetensors])
def test_resumed_in_the_middle_of_a_task_bit_for_bit(save, tmp_path):
    model, optimizer, si = trained(num_tasks=2)
    saved = save(si.state_dict(), tmp_path / "si")
    other = mlp(torch.float32)
    other.load_state_dict(model.state_dict())
    resumed = SynapticIntelligence(other, strength=0.0, damping=7.0)
    resumed.load_state_dict(saved)
    other_optimizer = torch.optim.Adam(other.parameters(), lr=0.02)
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.attach(other_optimizer)
    assert resumed.num_steps == 4
    assert resumed.damping == 0.1
    for batches in tasks(2, 5, torch.float32):
        train(model, optimizer, batches)
        train(other, other_optimizer, batches)
        assert_same(si.state_dict(), resumed.state_dict())
        si.consolidate()
        resumed.consolidate()
    assert_same(si.state_dict(), resumed.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, r"state\['damping'\] must be above 0, got 0.0"),
        ({"strength": -1.0}, ValueError, r"state\['strength'\] must be finite and at least 0"),
        ({"num_steps": 1.5}, TypeError, r"state\['num_steps'\] must be an integer"),
        ({"anchors": {}}, ValueError, "anchors and importances of the same names and shapes"),
        ({"integrals": {"0.weight": 3}}, TypeError, r"state\['integrals'\]\['0.weight'\] must be a torch.Tensor"),
        ({"integrals": {"0.weight": torch.zeros(2)}}, ValueError, "anchor of the path integral's shape for '0.weight'"),
        ({"extra": 1}, ValueError, "state must have the keys"),
    ],
)
def test_a_bad_state_is_refused_before_anything_changes(change, error, message):
    _, _, si = trained(num_tasks=2)
    before = copy.deepcopy(si.state_dict())
    with pytest.raises(error, match=message):
        si.load_state_dict({**before, **change})
    assert_same(si.state_dict(), before)


def test_a_state_of_another_model_is_refused():
    _, _, si = trained()
    other = SynapticIntelligence(nn.Linear(4, 6), strength=1.0)
    with pytest.raises(ValueError, match=r"state\['integrals'\]\['0.weight'\] must be of the model's shape"):
        other.load_state_dict(si.state_dict())


# --- bad input -------------------------------------------------------------------------------------------------------


def another():
    return torch.optim.SGD(mlp().parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: SynapticIntelligence("m", strength=1.0), TypeError, "model must be a torch.nn.Module"),
        (
            lambda m: SynapticIntelligence(m, strength=-1.0),
            ValueError,
            "strength must be finite and at least 0, got -1",
        ),
        (lambda m: SynapticIntelligence(m, strength=1.0, damping=-0.1), ValueError, "damping must be finite and at"),
        (lambda m: SynapticIntelligence(m, strength=1.0, damping=0), ValueError, "damping must be above 0, got 0"),
        (lambda m: SynapticIntelligence(m, 0.1, strength=1.0), TypeError, "optimizer must be a torch.optim.Optimizer"),
        (lambda m: SynapticIntelligence(m, another(), strength=1.0), ValueError, "but '0.weight' is not in its groups"),
        (
            lambda m: SynapticIntelligence(m, torch.optim.SGD(m[0].parameters(), lr=0.1), strength=1.0),
            ValueError,
            r"but '2.weight' is not in its groups \(2 in all\)",
        ),
        (
            lambda m: SynapticIntelligence(m, torch.optim.LBFGS(m.parameters()), strength=1.0),
            ValueError,
            "must not be LBFGS",
        ),
        (
            lambda m: SynapticIntelligence(m, torch.optim.SGD(m.parameters(), lr=1, maximize=True), strength=1.0),
            ValueError,
            "must not have maximize=True",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(mlp())


def test_a_part_of_the_model_may_be_frozen_and_unowned():
    model = mlp()
    model[0].requires_grad_(False)
    SynapticIntelligence(model, torch.optim.SGD(model[2].parameters(), lr=0.1), strength=1.0)


def test_consolidating_before_any_step():
    model, optimizer, si = trained()
    si.consolidate()
    before = copy.deepcopy(si.state_dict())
    with pytest.raises(RuntimeError, match="needs at least one optimizer step since the last consolidation"):
        si.consolidate()
    si.detach()
    train(model, optimizer, tasks(1, 3, torch.float32)[0])  # nobody looks
    with pytest.raises(RuntimeError, match="has seen none: is the optimizer attached"):
        si.consolidate()
    assert_same(si.state_dict(), before)


def test_a_path_that_saw_no_movement_is_an_error_not_a_zero():
    """Importances of zero, for a bookkeeping that never sees the parameters move, must not pass in silence."""
    model = mlp()
    si = SynapticIntelligence(model, strength=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in tasks(1, 3)[0]:
        backward(model, batch, optimizer)
        si.before_step()
        si.after_step()
        optimizer.step()
    with pytest.raises(RuntimeError, match="every path integral is zero, but the parameters moved"):
        si.consolidate()
    assert si.num_tasks == 0


def added(model):
    model.add_module("extra", nn.Linear(2, 2))


def removed(model):
    del model[2]


def resized(model):
    model[2] = nn.Linear(6, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (added, r"parameter 'extra.bias' was added to the model in the middle of a task \(4 steps"),
        (removed, "parameter '2.bias' was removed from the model in the middle of a task"),
        (resized, r"parameter '2.weight' was resized from \[3, 6\] to \[5, 6\] in the middle of a task"),
    ],
)
def test_a_model_that_changes_in_the_middle_of_a_task(change, message):
    model, optimizer, si = trained()
    before = copy.deepcopy(si.state_dict())
    change(model)
    for call in (si.before_step, si.consolidate, optimizer.step):
        with pytest.raises(RuntimeError, match=message):
            call()
    assert_same(si.state_dict(), before)


def test_a_model_may_grow_between_tasks():
    model, _, si = trained()
    si.consolidate()
    importance = si.importances["2.weight"].clone()
    old = model[2]
    model[2] = nn.Linear(6, 5)
    with torch.no_grad():
        model[2].weight[:3], model[2].bias[:3] = old.weight, old.bias
    model.add_module("extra", nn.Linear(5, 3))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    si.attach(optimizer)
    assert si.penalty().item() == 0.0
    train(model, optimizer, tasks(1, 4, torch.float32)[0])
    integral = si.integrals["2.weight"].clone()
    si.consolidate()
    assert set(si.importances) == set(start)
    delta = model[2].weight.detach() - start["2.weight"]
    want = integral.clamp(min=0) / (delta.square() + 0.1)
    want[:3] += importance
    assert_close(si.importances["2.weight"], want)
    assert si.importances["extra.weight"].any()


def test_what_is_protected_may_not_go():
    model, _, si = trained()
    si.consolidate()
    removed(model)
    with pytest.raises(RuntimeError, match="the model has lost parameters that are protected"):
        si.before_step()


def test_a_path_integral_that_is_not_finite():
    model, optimizer, si = trained()
    backward(model, tasks(1, 1, torch.float32)[0][0], optimizer)
    model[2].weight.grad[0, 0] = torch.inf
    optimizer.step()
    before = copy.deepcopy(si.state_dict())
    with pytest.raises(RuntimeError, match=r"the path integral of '2.weight' is not finite"):
        si.consolidate()
    for name, t in before["integrals"].items():
        assert torch.equal(si.integrals[name].nan_to_num(), t.nan_to_num())
    assert (si.num_tasks, si.num_steps, si.importances) == (0, 5, {})


def test_steps_out_of_order():
    model, (batches,) = mlp(), tasks(1, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    si = SynapticIntelligence(model, strength=1.0)
    with pytest.raises(RuntimeError, match=r"after_step\(\) must follow before_step\(\)"):
        si.after_step()
    si.attach(optimizer)
    backward(model, batches[0], optimizer)
    weights = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"step\(closure\) computes gradients within the step"):
        optimizer.step(lambda: None)
    assert torch.equal(model[0].weight, weights)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    optimizer = torch.optim.SparseAdam(model.parameters())
    SynapticIntelligence(model, optimizer, strength=1.0)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"the gradient of '0.weight' must be a dense tensor"):
        optimizer.step()


# --- two processes ---------------------------------------------------------------------------------------------------


def in_each_process(rank: int, rendezvous: str, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = mlp()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    for batches in tasks(2, 5):
        for x, y in batches:
            optimizer.zero_grad()
            half = slice(4 * rank, 4 * rank + 4)
            nn.functional.cross_entropy(wrapped(x[half]), y[half]).backward()
            optimizer.step()
        si.consolidate()
    torch.save(si.state_dict(), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


def test_processes_that_average_their_gradients_agree(tmp_path):
    multiprocessing.spawn(in_each_process, (f"file://{tmp_path / 'rendezvous'}", str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert_same(*states)
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    si = SynapticIntelligence(model, optimizer, strength=0.5)
    for batches in tasks(2, 5):
        train(model, optimizer, batches)
        si.consolidate()
    for name, importance in si.importances.items():
        assert importance.any()
        torch.testing.assert_close(states[0]["importances"][name], importance, rtol=1e-9, atol=1e-12)
