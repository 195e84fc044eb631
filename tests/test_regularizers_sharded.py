"""Regularizers over a model that FSDP2 shards over two processes, against the whole model in one."""

import copy
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from limpet import EWC, MemoryAwareSynapses, SynapticIntelligence
from tolerances import assert_close

STEPS = 4


def mlp():
    torch.manual_seed(0)  # five rows over two processes: three and two
    return nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))


def data(task, step=0):
    generator = torch.Generator().manual_seed(100 * task + step)
    return torch.randn(8, 7, generator=generator), torch.randint(3, (8,), generator=generator)


def in_each_process(rank, function, rendezvous, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    try:
        globals()[function](rank, Path(folder))
    finally:
        distributed.destroy_process_group()


def spawn(function, tmp_path):
    arguments = (function.__name__, f"file://{tmp_path / 'rendezvous'}", str(tmp_path))
    multiprocessing.spawn(in_each_process, arguments, nprocs=2)


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(copy.deepcopy(model), mesh=init_device_mesh("cpu", (2,)))


def moved(model):
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.25)


def same_grads(model, whole):
    for param, wanted in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(param.grad.full_tensor(), wanted.grad)


def a_penalty(rank, folder):
    whole = mlp()
    ewc = EWC(whole, strength=3.0)
    ewc.consolidate([data(0)])
    ewc.consolidate([data(1)])
    model = sharded(whole)
    ours = EWC(model, strength=1.0)
    ours.load_state_dict(ewc.state_dict())
    moved(whole)
    moved(model)
    assert_close(ours.penalty().detach(), ewc.penalty().detach())
    assert {type(t).__name__ for t in ours.anchors.values()} == {"DTensor"}
    held = sum(t.to_local().numel() for t in ours.anchors.values())
    assert held < sum(p.numel() for p in whole.parameters()) * 0.7  # of all elements, this process's own

    ours.penalty().backward()
    ewc.penalty().backward()
    same_grads(model, whole)
    assert_close(ours.add_penalty_grad_(), ewc.add_penalty_grad_())  # beside the gradients that are there
    same_grads(model, whole)
    for network in (model, whole):
        network.zero_grad()
    assert_close(ours.add_penalty_grad_(), ewc.add_penalty_grad_())  # where there are none
    same_grads(model, whole)
    whole[2].requires_grad_(False)
    model[2].requires_grad_(False)
    assert_close(ours.add_penalty_grad_(), ewc.add_penalty_grad_())

    with pytest.raises(TypeError, match=r"'0\.weight' must not be sharded over processes"):
        ours.consolidate([data(2)])
    assert ours.num_tasks == 2
    with pytest.raises(TypeError, match=r"'0\.weight' must not be sharded over processes"):
        MemoryAwareSynapses(model, 1.0).consolidate([data(2)])
    with pytest.raises(TypeError, match=r"'0\.weight' must not be sharded over processes with importance_format"):
        EWC(model, 1.0, importance_format="log8")


def test_the_penalty_is_the_sum_over_the_shards(tmp_path):
    spawn(a_penalty, tmp_path)


def train(model, optimizer, task, steps):
    """The same data on both processes, whose gradients are averaged: as one process that trains alone."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        x, y = data(task, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()


def a_run(rank, folder):
    whole = mlp().double()
    model = sharded(whole)
    runs = []
    for network in (whole, model):
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        si = SynapticIntelligence(network, optimizer, strength=0.5)
        runs.append((network, si, optimizer))
    for task in range(3):
        for network, si, optimizer in runs:
            train(network, optimizer, task, range(STEPS))
            si.consolidate()
    (whole, wanted, _), (model, si, _) = runs
    assert si.num_tasks == 3
    for name, importance in si.importances.items():
        assert_close(importance.full_tensor(), wanted.importances[name])
        assert float(wanted.importances[name].max()) > 0
        assert_close(si.anchors[name].full_tensor(), wanted.anchors[name])
    for param, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(param.full_tensor().detach(), other.detach())


def test_synaptic_intelligence_equals_the_run_of_one_process(tmp_path):
    spawn(a_run, tmp_path)


def a_resumed_run(rank, folder):
    def begin():
        model = sharded(mlp())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, optimizer, SynapticIntelligence(model, optimizer, strength=0.5)

    model, optimizer, si = begin()
    train(model, optimizer, 0, range(STEPS))
    si.consolidate()
    train(model, optimizer, 1, range(2))
    states = copy.deepcopy([model.state_dict(), optimizer.state_dict(), si.state_dict()])

    other = begin()
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    for network, adam, regularizer in ((model, optimizer, si), other):
        train(network, adam, 1, range(2, STEPS))
        regularizer.consolidate()
    for name, importance in si.importances.items():
        assert torch.equal(importance.to_local(), other[2].importances[name].to_local())
        assert torch.equal(si.anchors[name].to_local(), other[2].anchors[name].to_local())


def test_resumed_in_the_middle_of_a_task(tmp_path):
    spawn(a_resumed_run, tmp_path)
