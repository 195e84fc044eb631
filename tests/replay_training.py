"""Two tasks that are quickly learnt and quickly forgotten, and a loop with all moments of a method."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten


def tasks():
    """Four classes around the corners of a rectangle, two at a time: class-incremental."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [2.0, -1.0], [-2.0, -1.0]])
    for classes in ([0, 1], [2, 3]):
        y = torch.tensor(classes).repeat(300)[torch.randperm(600, generator=generator)]
        yield corners[y] + 0.6 * torch.randn(600, 2, generator=generator), y


def network():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # for so small a network threads only wait for each other
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 4))
    return model, torch.optim.Adam(model.parameters(), lr=1e-2)


def step(model, optimizer, method, x, y):
    """One step of the optimizer, and whatever moments the method has around it."""
    inputs, targets = method.mix(x, y) if hasattr(method, "mix") else (x, y)
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = F.cross_entropy(outputs, targets)
    add_penalty_grad_ = getattr(method, "add_penalty_grad_", None)
    (loss if add_penalty_grad_ or not hasattr(method, "penalty") else loss + method.penalty()).backward()
    for moment in (
        add_penalty_grad_,
        optimizer.step,
        getattr(method, "after_step", None),
        partial(method.observe, x, y, outputs[: len(y)]) if hasattr(method, "observe") else None,
    ):
        if moment:
            moment()


def train(model, optimizer, method):
    """Learn both tasks in batches of 20, with five passes over each."""
    for x, y in tasks():
        for some in torch.randperm(3000).remainder(600).split(20):
            step(model, optimizer, method, x[some], y[some])
        if hasattr(method, "end_task"):
            method.end_task([(x, y)])


def accuracy_on_the_first_task(make_method):
    model, optimizer = network()
    train(model, optimizer, make_method(model))
    x, y = next(tasks())
    return float((model(x).argmax(1) == y).double().mean())


def same(one, other):
    """Whether two states are the same, bit for bit."""
    (leaves, spec), (others, other_spec) = (tree_flatten(state) for state in (one, other))
    return spec == other_spec and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(leaves, others, strict=True)
    )
