"""Peak memory of a Fisher pass, by what torch's allocator was asked for."""

import torch
from torch import nn

import limpet
from compare import peak_bytes


def conv_net():
    """Activations of 2 MB a layer, and few parameters."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()]
    for _ in range(4):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def test_the_first_batch_needs_no_more_than_a_later_one():
    model = conv_net()
    x, y = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    activation = 32 * 16 * 32 * 32 * 4
    ordinary = peak_bytes(lambda: nn.functional.cross_entropy(model(x), y).backward())
    accumulator = limpet.FisherAccumulator(model)
    first = peak_bytes(lambda: accumulator.add((x, y)))  # with the check of rows, which must keep no graph
    later = peak_bytes(lambda: accumulator.add((x, y)))
    assert 4 * activation < first < later + activation / 2
    assert later < ordinary
