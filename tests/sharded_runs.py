"""What two processes do with models that ``fully_shard`` shards over them; each writes what it found to a file.

Every scenario takes the mesh and a folder of both processes, and gives what is compared with whole models afterwards.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Partial, distribute_module, distribute_tensor
from torch.nn import functional as F

from limpet import EWC, Composite, MemoryAwareSynapses, RWalk, SynapticIntelligence
from si_training import tasks

STRENGTH, DAMPING = 0.5, 0.1


class Net(nn.Module):
    """Sizes that two processes do not share evenly; of ``gain``, one of them has nothing."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.gain = nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return self.gain * self.last(torch.tanh(self.first(x)))


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return Net().to(dtype)


def data():
    torch.manual_seed(1)
    return tasks(2, 6)


def sharded(mesh, dtype=torch.float64):
    model = net(dtype)
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def moved(model, seed=2):
    """A state of EWC or MAS for a whole model, anchored elsewhere."""
    torch.manual_seed(seed)
    anchors = {name: p.detach() + torch.randn_like(p) for name, p in model.named_parameters()}
    importances = {name: torch.rand_like(p).detach() for name, p in model.named_parameters()}
    return {"anchors": anchors, "importances": importances, "num_tasks": 1, "constant": 3.0, "strength": STRENGTH}


def loaded(kind, model, state):
    regularizer = kind(model, strength=0.0)
    regularizer.load_state_dict({**regularizer.state_dict(), **state})
    return regularizer


def full(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: t.detach().full_tensor() for name, t in tensors.items()}


def grads(model) -> dict[str, Tensor]:
    return full({name: p.grad for name, p in model.named_parameters()})


def error(use: Callable[[], Any]) -> str:
    try:
        use()
    except (TypeError, ValueError, RuntimeError) as caught:
        return f"{type(caught).__name__}: {caught}"
    return ""


def train(model, optimizer, batches, around: Any = None):
    for x, y in batches:
        optimizer.zero_grad()
        half = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4)
        F.cross_entropy(model(x[half]), y[half]).backward()
        if around is not None:
            around.before_step()
        optimizer.step()
        if around is not None:
            around.after_step()


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# --- scenarios -------------------------------------------------------------------------------------------------------


def penalty(mesh, folder):
    found = {}
    for kind in (EWC, MemoryAwareSynapses):
        model = sharded(mesh)
        regularizer = loaded(kind, model, moved(net()))
        value = regularizer.penalty()
        (2 * value).backward()
        once = grads(model)
        added = regularizer.add_penalty_grad_()
        params = dict(model.named_parameters())
        held = {name: t.to_local() for name, t in regularizer.anchors.items()}
        found[kind.__name__] = {
            "value": value.detach(),
            "added": added,
            "grads": once,
            "grads after": grads(model),
            "own part": all(
                t.shape == params[name].to_local().shape and t.untyped_storage().nbytes() == t.nbytes
                for name, t in held.items()
            ),
        }
    return found


def frozen(mesh, folder):
    model = sharded(mesh)
    model.last.requires_grad_(False)
    ewc = loaded(EWC, model, moved(net()))
    return {"value": ewc.add_penalty_grad_(), "untouched": model.last.weight.grad is None}


def narrow_floats(mesh, folder):
    model = sharded(mesh, torch.bfloat16)
    ewc = loaded(EWC, model, moved(net(torch.bfloat16)))
    return {"value": ewc.add_penalty_grad_(), "grads": grads(model)}


def replicated(mesh, folder):
    """Value and gradient where every process holds all, and where one of two dimensions of a mesh shards."""
    found = {}
    for name, model in (
        ("all", distribute_module(net(), mesh)),
        ("hybrid", sharded(init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))),
    ):
        ewc = loaded(EWC, model, moved(net()))
        value = ewc.penalty()
        value.backward()
        found[name] = {"value": value.detach(), "grads": grads(model)}
    return found


def in_the_loss(mesh, folder):
    """The penalty in the loss, between a forward pass, after which fully_shard leaves parameters whole, and backward"""
    model = sharded(mesh)
    ewc = loaded(EWC, model, moved(net()))
    ewc.penalty()
    x, y = data()[0][0]
    half = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4)
    loss = F.cross_entropy(model(x[half]), y[half])
    refused = error(ewc.penalty)
    model.reshard()
    (loss + ewc.penalty()).backward()
    return {"refused": refused, "grads": grads(model)}


def integrals(mesh, folder):
    """Synaptic Intelligence in hooks and by hand."""
    found = {}
    for how in ("hooks", "by hand", "sharded later"):
        model = net() if how == "sharded later" else sharded(mesh)
        si = SynapticIntelligence(model, strength=STRENGTH, damping=DAMPING)
        if how == "sharded later":
            fully_shard(model, mesh=mesh)
        optimizer = optimizer_of(model)
        if how != "by hand":
            si.attach(optimizer)
        for batches in data():
            train(model, optimizer, batches, si if how == "by hand" else None)
            si.consolidate()
        found[how] = {"theta": full(dict(model.named_parameters())), "importances": full(si.importances)}
    return found


def between_steps(mesh, folder):
    """Parameters moved by something else between steps, once as wholes and once part by part."""
    model = sharded(mesh)
    optimizer = optimizer_of(model)
    si = SynapticIntelligence(model, optimizer, strength=STRENGTH)
    for k, batch in enumerate(data()[0]):
        train(model, optimizer, [batch])
        with torch.no_grad():
            for param in model.parameters():
                (param if k % 2 else param.to_local()).mul_(0.9)
    return full(si.integrals)


def walk(mesh, folder):
    model = sharded(mesh)
    optimizer = optimizer_of(model)
    rwalk = RWalk(model, optimizer, strength=STRENGTH, interval=4)
    for batches in data():
        train(model, optimizer, batches)
        rwalk.consolidate()
    return {"theta": full(dict(model.named_parameters())), "importances": full(rwalk.importances)}


def composite(mesh, folder):
    model = sharded(mesh)
    ewc, mas = loaded(EWC, model, moved(net())), loaded(MemoryAwareSynapses, model, moved(net(), seed=3))
    both = Composite([ewc, mas])
    value = both.penalty()
    value.backward()
    return {"value": value.detach(), "parts": (ewc.penalty() + mas.penalty()).detach(), "grads": grads(model)}


def resumed(mesh, folder):
    """A run saved in the middle of a task, and resumed: from parts, whole tensors, a distributed checkpoint."""
    first, second = data()
    model = sharded(mesh)
    optimizer = optimizer_of(model)
    si = SynapticIntelligence(model, optimizer, strength=STRENGTH, damping=DAMPING)
    train(model, optimizer, first)
    si.consolidate()
    train(model, optimizer, second[:3])
    path = folder / f"middle{distributed.get_rank()}.pt"
    torch.save([model.state_dict(), optimizer.state_dict(), si.state_dict()], path)
    found = {}
    for how in ("parts", "whole", "checkpoint"):
        states = torch.load(path, weights_only=True)
        other = sharded(mesh)
        other.load_state_dict(states[0])
        again = optimizer_of(other)
        again.load_state_dict(states[1])
        state = states[2]
        tensors = [kind for kind, value in state.items() if isinstance(value, dict)]
        if how == "whole":
            state = {**state, **{kind: full(state[kind]) for kind in tensors}}
        if how == "checkpoint":
            checkpoint.save({"si": state}, checkpoint_id=folder / "checkpoint")
            empty = {kind: {name: torch.zeros_like(t) for name, t in state[kind].items()} for kind in tensors}
            read = {"si": {**dict.fromkeys(state, 0), **empty}}
            checkpoint.load(read, checkpoint_id=folder / "checkpoint")
            state = read["si"]
        back = SynapticIntelligence(other, again, strength=0.0)
        back.load_state_dict(state)
        train(other, again, second[3:])
        back.consolidate()
        found[how] = {"theta": full(dict(other.named_parameters())), "importances": full(back.importances)}
    train(model, optimizer, second[3:])
    si.consolidate()
    found["straight on"] = {"theta": full(dict(model.named_parameters())), "importances": full(si.importances)}
    return found


def refusals(mesh, folder):
    model = sharded(mesh)
    ewc = loaded(EWC, model, moved(net()))
    before = ewc.penalty().item()
    found = {
        kind.__name__: error(lambda kind=kind: kind(model, strength=1.0).consolidate([]))
        for kind in (EWC, MemoryAwareSynapses)
    }
    found["packed"] = error(lambda: EWC(model, strength=1.0, importance_format="log8"))

    pending = nn.Linear(2, 2, bias=False)
    weight = distribute_tensor(pending.weight.detach(), mesh, [Partial()])
    pending.weight = nn.Parameter(weight)
    found["pending"] = error(lambda: EWC(pending, strength=1.0))

    tall = nn.Linear(4, 6).double()
    wide = loaded(EWC, fully_shard(tall, mesh=mesh), moved(nn.Linear(4, 5).double()))
    found["grown"] = error(wide.penalty)

    gain = dict(model.named_parameters())["gain"]
    gain.grad = distribute_tensor(torch.zeros(1).double(), mesh, [Partial()])
    found["gradient"] = error(ewc.add_penalty_grad_)
    found["no gradient changed"] = all(p.grad is None for p in model.parameters() if p is not gain)
    found["unchanged"] = ewc.penalty().item() == before

    optimizer = optimizer_of(model)
    gain.grad = None
    si = SynapticIntelligence(model, optimizer, strength=1.0)
    train(model, optimizer, data()[0][:2])
    si.integrals["gain"].to_local().fill_(torch.nan)  # in one process: the other has no part of it
    found["not finite"] = error(si.consolidate)
    si.integrals["gain"].to_local().fill_(1.0)  # the only one that is not zero, again in one process
    for name in si.integrals.keys() - {"gain"}:
        si.integrals[name].zero_()
    found["one path integral"] = error(si.consolidate)
    rwalk = RWalk(model, strength=1.0)
    train(model, optimizer, data()[0][:2], rwalk)
    rwalk.fisher["gain"].to_local().fill_(torch.nan)
    found["Fisher information"] = error(rwalk.consolidate)
    return found


SCENARIOS = (
    penalty,
    frozen,
    narrow_floats,
    replicated,
    in_the_loss,
    integrals,
    between_steps,
    walk,
    composite,
    resumed,
    refusals,
)


def in_each_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    path = Path(folder)
    distributed.init_process_group("gloo", init_method=f"file://{path / 'rendezvous'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.save({scenario.__name__: scenario(mesh, path) for scenario in SCENARIOS}, path / f"{rank}.pt")
    distributed.destroy_process_group()


def run(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes found, by scenario."""
    multiprocessing.spawn(in_each_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
