"""A training step of five columns: beside five plain columns forward and one backward, and beside its bare products.

Where avalanche-lib is installed, its PNN of as many columns and layers takes the same step. It has an adapter at each
of the three layers, the first one too, and none at the head: about as many products as ours.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpet import ProgressiveNetwork
from peers.measure import quiet
from peers.operators import declare_torchvision_operators

COLUMNS, WIDTH, BATCH, CLASSES = 5, 512, 128, 10


def column():
    layers = [part for _ in range(3) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def network(lateral):
    net = ProgressiveNetwork(column, lateral=lateral)
    for task in range(COLUMNS):
        net.add_column(task)
        if task < COLUMNS - 1:
            net.freeze()
    return net


def step(net, x, y, **options):
    learning = [parameter for parameter in net.parameters() if parameter.requires_grad]

    def call():
        for parameter in learning:
            parameter.grad = None
        given = {name: make() for name, make in options.items()}
        F.cross_entropy(net(x, COLUMNS - 1, **given), y).backward()

    return call


def avalanche():
    """Avalanche's network after five tasks; None where it is not installed."""
    declare_torchvision_operators()
    try:
        with quiet():
            from avalanche.models.pnn import PNN
    except ImportError:
        return None
    net = PNN(num_layers=3, in_features=WIDTH, hidden_features_per_column=WIDTH, adapter="mlp")
    for task in range(COLUMNS):
        data = SimpleNamespace(targets_task_labels=[task])
        experience = SimpleNamespace(classes_in_this_experience=list(range(CLASSES)), task_labels=[task], dataset=data)
        net.pre_adapt(None, experience)
        for head in list(net.classifier.classifiers.values())[:-1]:
            head.requires_grad_(False)
    return net


def plain(x, y):
    """(columns x forward + 1 x backward) of one column without laterals: what the target is a multiple of."""
    frozen, last = [column().eval().requires_grad_(False) for _ in range(COLUMNS - 1)], column()

    def call():
        with torch.no_grad():
            for one in frozen:
                one(x)
        for parameter in last.parameters():
            parameter.grad = None
        F.cross_entropy(last(x), y).backward()

    return call


def products(net):
    """Every matrix product of the step, forward and backward, into new memory as torch has it, and nothing else."""
    pairs, kept = [], []
    for number, one in enumerate(net.columns):
        for name, weight in one.named_parameters():
            if weight.dim() < 2:
                continue
            w, a, d = weight.detach(), torch.randn(BATCH, weight.shape[1]), torch.randn(BATCH, weight.shape[0])
            pairs.append((a, w.T))
            if number == COLUMNS - 1:
                pairs.append((d.T, a))
                if "projection" not in name and name != "network.0.weight":  # what these read needs no gradient
                    pairs.append((d, w))

    def call():
        kept.clear()  # gradients live until the next step
        for left, right in pairs:
            product = left @ right
            if len(left) != BATCH:
                kept.append(product)

    return call


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_a_step(lateral, compare, in_earnest):
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    net = network(lateral)
    calls = {"ours": step(net, x, y), "baseline": plain(x, y)}
    if in_earnest:
        calls["ours, torch.compile"] = step(torch.compile(net), x, y)
        other = avalanche() if lateral == "adapter" else None
        if other is not None:
            calls["Avalanche's PNN"] = step(other, x, y)
    what = f"a step of {COLUMNS} columns of 3 x {WIDTH}, batch {BATCH}, {lateral}"
    compare(what, "5 plain columns forward, 1 backward", "at most 1.15", calls)


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_a_step_beside_its_products(lateral, compare):
    x, y = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    net = network(lateral)
    calls = {"ours": step(net, x, y), "baseline": products(net)}
    what = f"a step of {COLUMNS} columns of 3 x {WIDTH}, batch {BATCH}, {lateral}"
    compare(what, "the matrix products in it", "at most 1.15", calls)


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_a_step_with_cached_features(lateral, compare):
    """What earlier columns compute is looked up: rows drawn from those of 4096 samples."""
    data, y = torch.randn(4096, WIDTH), torch.randint(CLASSES, (BATCH,))
    net, index = network(lateral), torch.randperm(4096)[:BATCH]
    cache = net.cache_features(data, COLUMNS - 1)
    calls = {"ours": step(net, data[index], y, features=lambda: cache[index]), "baseline": step(net, data[index], y)}
    what = f"a step of {COLUMNS} columns of 3 x {WIDTH}, batch {BATCH}, {lateral}, features cached"
    compare(what, "the same without a cache", "", calls, notes={"megabytes": round(cache.nbytes / 1e6)})
