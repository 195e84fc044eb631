"""What replay adds to a training step of Split MNIST's network, 784-400-400 with Adam: the buffer's own work."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpet import DarkReplay, Replay

CAPACITY, STEPS = 1000, 20


def network():
    widths = [784, 400, 400]
    layers = [layer for pair in itertools.pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(400, 10))
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def batches(rows):
    return [(torch.rand(rows, 784), torch.randint(10, (rows,))) for _ in range(STEPS)]


def filled(method, model):
    x, y = torch.rand(CAPACITY, 784), torch.randint(10, (CAPACITY,))
    with torch.no_grad():
        method.observe(x, y, model(x))
    return method


def training(rows, method=None):
    """Steps on so many new rows, beside replayed ones if there is a method."""
    model, optimizer = network()
    replay, new = method and filled(method, model), batches(rows)

    def run():
        for x, y in new:
            inputs, targets = replay.mix(x, y) if replay else (x, y)
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if replay:
                replay.observe(x, y)

    return run


@pytest.mark.parametrize(("new", "replayed", "target"), [(102, 26, "at most 1.2"), (128, 32, ""), (128, 128, "")])
def test_a_step_with_replay(new, replayed, target, compare):
    rows = new + replayed if target else new
    calls = {
        "ours": training(new, Replay(CAPACITY, fraction=replayed / (new + replayed))),
        "baseline": training(rows),
        "as many rows, all new": training(new + replayed),
    }
    if target:
        del calls["as many rows, all new"]
    what = f"a step on {new} new rows of 784 and {replayed} replayed, 784-400-400, Adam"
    compare(what, f"the same on {rows} new rows, without replay", target, calls)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_step_with_dark_replay(beta, compare):
    """Beside the same passes over rows that lie ready: what drawing, gathering and keeping cost."""

    def by_dark_replay():
        model, optimizer = network()
        dark = filled(DarkReplay(model, CAPACITY, alpha=0.5, beta=beta, batch_size=128), model)

        def run():
            for x, y in new:
                optimizer.zero_grad()
                outputs = model(x)
                (F.cross_entropy(outputs, y) + dark.penalty()).backward()
                optimizer.step()
                dark.observe(x, y, outputs)

        return run

    def by_hand():
        model, optimizer = network()
        (old_x, old_y), logits = batches(128)[0], torch.randn(128, 10)

        def run():
            for x, y in new:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y) + 0.5 * F.mse_loss(model(old_x), logits)
                if beta:
                    loss = loss + beta * F.cross_entropy(model(old_x), old_y)
                loss.backward()
                optimizer.step()

        return run

    new = batches(128)
    what = f"a step of {'DER++' if beta else 'DER'}, 128 new rows and 128 replayed{' twice' if beta else ''}"
    compare(
        what, "the same passes over ready rows, nothing kept", "", {"ours": by_dark_replay(), "baseline": by_hand()}
    )
