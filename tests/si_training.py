"""Synaptic Intelligence written out by hand in float64, and runs to compare it with."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(dtype=torch.float64):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def tasks(count=3, steps=12, dtype=torch.float64):
    """Batches of a few separable classes, others in each task."""
    drawn = []
    for _ in range(count):
        centres = 2 * torch.randn(3, 4, dtype=dtype)
        labels = [torch.randint(3, (8,)) for _ in range(steps)]
        drawn.append([(centres[y] + 0.5 * torch.randn(8, 4, dtype=dtype), y) for y in labels])
    return drawn


def sgd(lr=0.1, momentum=0.9) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
    """``v = momentum v + g``, ``theta -= lr v``: (theta, g) -> the next theta."""
    state: list[Tensor] = []

    def step(params, grads):
        state[:] = [momentum * v + g for v, g in zip(state, grads, strict=True)] if state else list(grads)
        return [p - lr * v for p, v in zip(params, state, strict=True)]

    return step


def adam(lr=0.02, beta1=0.9, beta2=0.999, eps=1e-8) -> Callable[[list[Tensor], list[Tensor]], list[Tensor]]:
    """Kingma and Ba 2015, algorithm 1."""
    means: list[Tensor] = []
    squares: list[Tensor] = []
    count = [0]

    def step(params, grads):
        count[0] += 1
        zeros = [torch.zeros_like(g) for g in grads]
        means[:] = [beta1 * m + (1 - beta1) * g for m, g in zip(means or zeros, grads, strict=True)]
        squares[:] = [beta2 * v + (1 - beta2) * g * g for v, g in zip(squares or zeros, grads, strict=True)]
        a, b = 1 - beta1 ** count[0], 1 - beta2 ** count[0]
        return [p - lr * (m / a) / ((v / b).sqrt() + eps) for p, m, v in zip(params, means, squares, strict=True)]

    return step


def by_hand(model, data, step, strength, damping):
    """Parameters and importances [*] by name after all tasks, of the published formulas."""
    model = copy.deepcopy(model).double()
    names = [name for name, _ in model.named_parameters()]
    theta = [p.detach().clone() for p in model.parameters()]
    anchors, importances = theta, [torch.zeros_like(p) for p in theta]
    for batches in data:
        omega = [torch.zeros_like(p) for p in theta]
        for x, y in batches:
            leaves = [p.clone().requires_grad_() for p in theta]
            logits = torch.func.functional_call(model, dict(zip(names, leaves, strict=True)), (x.double(),))
            own = torch.autograd.grad(F.cross_entropy(logits, y), leaves)
            total = [
                g + 2 * strength * big * (p - a) for g, big, p, a in zip(own, importances, theta, anchors, strict=True)
            ]
            after = step(theta, total)
            omega = [o - g * (b - p) for o, g, b, p in zip(omega, own, after, theta, strict=True)]
            theta = after
        importances = [
            big + o.clamp(min=0) / ((p - a) ** 2 + damping)
            for big, o, p, a in zip(importances, omega, theta, anchors, strict=True)
        ]
        anchors = theta
    return dict(zip(names, theta, strict=True)), dict(zip(names, importances, strict=True))


def backward(model, batch, optimizer):
    """One task's own gradient into ``.grad``."""
    optimizer.zero_grad()
    x, y = batch
    F.cross_entropy(model(x), y).backward()
