"""Columns of other kinds: images, residual blocks, transformers; where laterals find their places."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from limpet import ProgressiveNetwork
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def grown(factory, tasks="ab", **options):
    net = ProgressiveNetwork(factory, **options)
    for task in tasks:
        net.add_column(task)
        net.freeze()
    return net


def cnn(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 3),
    )


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


class Block(nn.Module):
    """A transformer's block that gives a tuple and is given its input by name."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden):
        normal = self.norm(hidden)
        hidden = hidden + self.attention(normal, normal, normal, need_weights=False)[0]
        return hidden + self.feed(hidden), "cache"


class Transformer(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(3))
        self.head = nn.Linear(width, 4)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden, _ = block(hidden=hidden)
        return self.head(hidden.mean(1))


IMAGES = torch.zeros(2, 1, 8, 8)
TOKENS = torch.zeros(2, 5, dtype=torch.int64)


def test_convolutions_by_hand():
    """V has a kernel of 1; U has the convolution's own kernel, stride and padding."""
    net = grown(lambda width=6: cnn(width).double())
    net.eval()
    net.columns[0].network[1].running_mean.fill_(0.1)
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    first, second = (column.network for column in net.columns)
    lateral, head = net.columns[1].laterals["0"], net.columns[1].laterals["1"]
    source, below = lateral.sources["0"], first[:3](x)
    assert lateral.up.weight.shape == (12, 6, 3, 3)
    assert source.projection.weight.shape == (6, 6, 1, 1)
    crossed = F.conv2d(F.conv2d(source.alpha * below, source.projection.weight).relu(), lateral.up.weight, None, 2, 1)
    middle = F.conv2d(second[:3](x), second[3].weight, second[3].bias, 2, 1) + crossed
    hidden = second[6](second[5](second[4](middle)))
    source, below = head.sources["0"], first[:7](x)
    crossed = F.linear(F.linear(source.alpha * below, source.projection.weight).relu(), head.up.weight)
    want = F.linear(hidden, second[7].weight, second[7].bias) + crossed
    torch.testing.assert_close(net(x, "b"), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
@pytest.mark.parametrize("kind", ["cnn", "residual", "transformer", "groups", "sequence"])
def test_columns_read_each_other(kind, lateral):
    def residual(width=4):
        return nn.Sequential(
            nn.Conv2d(1, width, 3), Residual(width, 2 * width, 2), Residual(2 * width, width, 1),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3),
        )  # fmt: skip

    def groups(width=4):
        images = [nn.Conv1d(1, width, 3), nn.Conv1d(width, width, 3, groups=width)]
        return nn.Sequential(*images, nn.Flatten(), nn.Linear(4 * width, 2))

    def sequence(width=4):
        return nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))

    factory, options, x = {
        "cnn": (cnn, {}, torch.randn(4, 1, 8, 8)),
        "residual": (residual, {"example": torch.zeros(1, 1, 9, 9)}, torch.randn(4, 1, 9, 9)),
        "transformer": (
            Transformer,
            {"example": TOKENS, "lateral_points": ["blocks.1", "blocks.2"]},
            torch.randint(11, (4, 7)),
        ),
        "groups": (groups, {}, torch.randn(4, 1, 8)),
        "sequence": (sequence, {}, torch.randn(4, 6, 8)),
    }[kind]
    net = ProgressiveNetwork(factory, lateral=lateral, **options)
    net.add_column("a")
    net.freeze()
    net.add_column("b", width=6)
    net.freeze()
    net.add_column("c")
    net.eval()
    before = net(x, "c")
    before.square().sum().backward()
    assert len(net.columns[2].pairs) == 2 * len(net.columns[2].points)
    for name, parameter in net.columns[2].laterals.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        for parameter in net.columns[0].parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(net(x, "c"), before)


def test_gates_act_on_channels():
    def two_convolutions():
        layers = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Conv2d(5, 5, 3), nn.Flatten(), nn.Linear(80, 2))
        return layers.double()

    net = grown(two_convolutions, lateral="gated", lateral_points=["0"])
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)
    first, second = (column.network for column in net.columns)
    gate = net.columns[1].laterals["0"].sources["0"]
    y, h = (F.conv2d(x, network[0].weight, network[0].bias) for network in (second, first))
    g = torch.sigmoid(F.conv2d(h, gate.weight[:, :, None, None], gate.bias))
    torch.testing.assert_close(net(x, "b"), second[1:](y * g + h * (1 - g)), rtol=1e-12, atol=1e-12)


def test_batch_statistics_of_an_earlier_column_stay():
    net = grown(cnn, "a")
    net.add_column("b")
    net.train()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    for _ in range(3):
        net(torch.randn(8, 1, 8, 8) + 1, "b")
    moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if name.startswith("columns.1")}


def test_an_example_is_run_without_a_trace():
    state = torch.get_rng_state()
    column = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), Residual(4, 4, 1))
    assert not torch.equal(torch.get_rng_state(), state)
    state = torch.get_rng_state()
    net = ProgressiveNetwork(lambda: column, lateral_points=["3"], example=IMAGES + 1)
    net.add_column("a")
    assert torch.equal(torch.get_rng_state(), state)
    assert column[1].running_mean.abs().sum() == 0
    assert column[1].training
    assert len(column[3]._forward_hooks) == 1  # the column's own


def test_lazy_layers_become_what_the_example_shows():
    def lazy():
        return nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))

    net = grown(lazy, example=torch.zeros(2, 5), lateral_points=["2"])
    assert net(torch.randn(4, 5), "b").shape == (4, 3)
    assert net.columns[1].laterals["0"].up.weight.shape == (3, 6)


def test_bfloat16_images_follow_float64():
    net = grown(cnn).bfloat16().eval()
    x = torch.randn(8, 1, 8, 8).bfloat16()
    half = net(x, "b")
    assert_close(half, net.double()(x.double(), "b"), torch.bfloat16)
