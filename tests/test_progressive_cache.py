"""Features of earlier columns, kept for a data set."""

import re

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from columns import grown, mlp, normalised
from limpet import ProgressiveNetwork
from limpet.buffers import memory

pytestmark = pytest.mark.usefixtures("one_thread")


def learned(cached, lateral, batch_size=16, epochs=2):
    """A third column after two epochs, earlier ones run in the same batches or not at all."""
    torch.manual_seed(1)
    net = grown(normalised, lateral=lateral)
    x, y = torch.randn(40, 5), torch.randint(3, (40,))
    cache = net.cache_features(x, "c", batch_size=batch_size) if cached else None
    optimizer = torch.optim.Adam(p for p in net.parameters() if p.requires_grad)
    torch.manual_seed(2)
    for _ in range(epochs):
        for index in torch.arange(40).split(batch_size):
            optimizer.zero_grad()
            features = None if cache is None else cache[index]
            F.cross_entropy(net(x[index], "c", features=features), y[index]).backward()
            optimizer.step()
    return net.state_dict()


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_what_is_learned_is_the_same_bit_for_bit(lateral):
    with_cache, without = learned(True, lateral), learned(False, lateral)
    for name, tensor in without.items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(with_cache[name], tensor), name


def test_any_samples_in_any_order_and_no_earlier_column_runs():
    net, x = grown(lambda: mlp().double()), torch.randn(30, 5, dtype=torch.float64)
    cache = net.cache_features(x, "c", batch_size=7)
    want = net(x, "c")
    ran = []
    for number, column in enumerate(net.columns):
        column.network.register_forward_hook(lambda *_, number=number: ran.append(number))
    index = torch.tensor([28, 3, 3, 11])
    torch.testing.assert_close(net(x[index], "c", features=cache[index]), want[index])
    torch.testing.assert_close(net(x[5:9], "c", features=cache[5:9]), want[5:9])
    torch.testing.assert_close(net(x, "c", features=cache), want)
    assert set(ran) == {2}
    first = net.cache_features(x, "a")
    assert first.nbytes == net.cache_nbytes(x, "a") == 0
    torch.testing.assert_close(net(x[index], "a", features=first[index]), net(x[index], "a"))


def test_its_size_is_known_beforehand():
    net, x = grown(lambda: mlp(width=6)), torch.randn(30, 5)
    assert net.cache_nbytes(x, "c") == 30 * 2 * 2 * 6 * 4  # two columns, two points of six floats
    cache = net.cache_features(x, "c")
    assert (cache.nbytes, len(cache)) == (30 * 2 * 2 * 6 * 4, 30)
    pruned = net.lateral_sensitivity([(x, torch.zeros(30))], "c")
    pruned.shares[:, 0] = 0.0
    net.prune_laterals(pruned, 1e-9)
    assert net.cache_nbytes(x, "c") == 30 * 2 * 6 * 4


def test_images():
    def images():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(3, 2))

    net, x = grown(images, "ab", lateral_points=["2"]), torch.randn(9, 2, 5, 5)
    index = torch.randperm(9)[:4]
    torch.testing.assert_close(net(x[index], "b", features=net.cache_features(x, "b")[index]), net(x[index], "b"))


def test_no_room(monkeypatch):
    monkeypatch.setattr(memory, "_free", lambda device: 2879)
    net, x = grown(lambda: mlp(width=6)), torch.randn(30, 5)
    with pytest.raises(ValueError, match="cached features must fit cpu: 2880 bytes are asked for, 2879 are free"):
        net.cache_features(x, "c")


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_compiled_one_graph_serves_every_batch(lateral, backend):
    torch._dynamo.reset()
    net, x = grown(lambda: mlp().double(), lateral=lateral), torch.randn(40, 5, dtype=torch.float64)
    graphs = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=graphs, fullgraph=True)
    parameters = [p for p in net.parameters() if p.requires_grad]
    for cache in (net.cache_features(x, "c"), net.cache_features(x, "c", batch_size=7)):
        for index in torch.randperm(40).split(8):
            answers = compiled(x[index], "c", features=cache[index]), net(x[index], "c")
            gradients = [torch.autograd.grad(a.square().sum(), parameters) for a in answers]
            torch.testing.assert_close(*answers)
            torch.testing.assert_close(*gradients)
    assert graphs.frame_count == 1


def test_in_a_compiled_step_features_of_changed_columns_are_refused():
    torch._dynamo.reset()
    net, x = grown(tasks="ab"), torch.randn(6, 5)
    cache = net.cache_features(x, "b")
    step = torch.compile(lambda index: net(x[index], "b", features=cache[index]), backend="aot_eager")
    index = torch.tensor([4, 0, 1])
    torch.testing.assert_close(step(index), net(x[index], "b"))
    change(net)
    with pytest.raises(RuntimeError, match="call cache_features again"):
        step(index)


def change(net):
    with torch.no_grad():
        net.columns[0].network[0].bias.add_(1)


@pytest.mark.parametrize("how", [change, lambda net: net.double(), lambda net: net.load_state_dict(net.state_dict())])
def test_it_is_refused_after_earlier_columns_changed(how):
    net, x = grown(), torch.randn(6, 5)
    cache = net.cache_features(x, "c")
    with torch.no_grad():
        net.columns[2].network[0].bias.add_(1)  # its own column learns
    rows = cache[:3]
    assert torch.equal(net(x[:3], "c", features=rows), net(x[:3], "c"))
    how(net)
    with pytest.raises(RuntimeError, match="an earlier column was changed, moved or cast: call cache_features again"):
        cache[:3]


def test_bad_use():
    net, x = grown(tasks="ab"), torch.randn(6, 5)
    cache = net.cache_features(x, "b")
    net.freeze()
    net.add_column("c")
    for use, words in (
        (lambda: net(x, "c", features=cache), "features must be those of the task's own column"),
        (lambda: grown(tasks="ab")(x, "b", features=cache), "features must be those of the task's own column"),
        (lambda: net(x, features=cache), "task must be one that has a column"),
        (lambda: net(x[:4], "b", features=cache[:3]), "features must be of the batch's 4 samples, got 3"),
        (lambda: net(x.clone().requires_grad_(), "b", features=cache), "inputs must not require a gradient"),
        (lambda: net.cache_features(x[:0], "b"), "inputs must be tensors [N, *] of as many samples each"),
        (lambda: net.cache_features((x, x[:2]), "b"), "inputs must be tensors [N, *] of as many samples each"),
        (lambda: net.cache_features(x, "d"), "task must be one that has a column"),
        (lambda: net.cache_features(x, "b", batch_size=0), "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            use()
    assert torch.equal(net(x, "b", features=cache), net(x, "b"))
    with pytest.raises(ValueError, match="column"):
        ProgressiveNetwork(mlp).cache_nbytes(x, "a")
