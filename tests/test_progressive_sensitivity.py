"""What laterals carry, on columns where it is known."""

import math
import re

import pytest
import torch
from torch import nn

from columns import grown, mlp
from limpet import ProgressiveNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


def identity(x):
    return x


def linear():
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)).double()


def by_hand(net, x):
    """Rusu et al. 2016, section 3, for linear columns: the gradient of log p at features is M^T (e_y - p)."""
    lateral = net.columns[2].laterals["0"]
    maps = [lateral.up.weight @ (source.alpha * source.projection.weight) for source in lateral.sources.values()]
    maps.append(net.columns[2].network[1].weight)
    probabilities = net(x, "c").softmax(1)
    columns = [nn.functional.linear(x, *column.network[0].parameters()) for column in net.columns]
    values = []
    for matrix, features in zip(maps, columns, strict=True):
        grads = (torch.eye(3, dtype=torch.float64)[None] - probabilities[:, None]) @ matrix  # [N, y, units]
        information = (probabilities[:, :, None] * grads.square()).sum((0, 1))
        values.append((features.var(0, correction=0) * information).sum())
    return torch.stack(values) / sum(values)


def test_fisher_by_hand():
    net = grown(linear, activation=identity)
    with torch.no_grad():
        for source in net.columns[2].laterals["0"].sources.values():
            source.alpha.fill_(1.5)
    x = torch.randn(50, 4, dtype=torch.float64)
    batches = [(x[:30], None), (x[30:], None)]
    found = net.lateral_sensitivity(batches, "c")
    with torch.no_grad():
        torch.testing.assert_close(found.shares[0], by_hand(net, x), rtol=1e-6, atol=0)
    assert found.shares.shape == (1, 3)
    assert (found.task, found.tasks, found.points) == ("c", ("a", "b", "c"), ("1",))
    assert net.lateral_sensitivity(batches, "a").shares.tolist() == [[1.0]]


@pytest.mark.parametrize("measure", ["fisher", "perturbation"])
def test_a_class_that_hangs_on_two_features(measure):
    """logit = s (own + 2 * lateral) with equal deviations: 1 / sigma^2, and the squared gradient, are 1 : 4."""

    def column():
        return nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False))

    net = grown(column, "ab", activation=identity)
    with torch.no_grad():
        net.columns[0].network[0].weight.copy_(torch.tensor([[1.0, 0.0]]))
        net.columns[1].network[0].weight.copy_(torch.tensor([[0.0, 1.0]]))
        net.columns[1].network[1].weight.copy_(torch.tensor([[3.0], [-3.0]]))
        lateral = net.columns[1].laterals["0"]
        lateral.up.weight.copy_(torch.tensor([[3.0], [-3.0]]))
        lateral.sources["0"].alpha.fill_(0.5)
        lateral.sources["0"].projection.weight.fill_(4.0)
    x = torch.randn(4000, 2)
    x = (x - x.mean(0)) / x.std(0)
    found = net.lateral_sensitivity([(x, net(x, "b").argmax(1))], "b", measure=measure)
    share = found.shares[0, 0].item()
    assert share == pytest.approx(0.8, rel=1e-4 if measure == "fisher" else 0.02)
    assert found.measure == measure
    assert "0.800" in str(found) or measure == "perturbation"


def test_what_nobody_reads_has_no_share():
    net = grown(mlp, "abc", lateral="sum", lateral_points=["2"])
    with torch.no_grad():
        net.columns[0].network[2].weight.zero_()  # constant features
    x = torch.randn(100, 5)
    found = net.lateral_sensitivity([(x, net(x, "c").argmax(1))], "c", measure="perturbation")
    assert found.shares[0, 0] == 0.0
    assert found.shares[0].sum().item() == pytest.approx(1.0)
    assert net.lateral_sensitivity([(x, None)], "c").shares[0, 0] < 1e-9
    assert net.prune_laterals(found, 1e-6) == [("2", "a")]
    ran = []
    net.columns[0].network.register_forward_hook(lambda *_: ran.append(0))
    net(x, "b")
    assert ran == [0]
    net.columns[1].prune({(0, 0)})
    net(x, "c")
    assert ran == [0]


def test_measuring_changes_nothing():
    net = grown(mlp, "ab")
    net.train()
    x = torch.randn(10, 5)
    before, state = net(x, "b"), torch.get_rng_state()
    for measure in ("fisher", "perturbation"):
        net.lateral_sensitivity([(x, net(x, "b").argmax(1))], "b", measure=measure)
    assert torch.equal(net(x, "b"), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.columns[1].training
    assert all(p.grad is None for p in net.parameters())


def test_images_and_pictures(tmp_path):
    def cnn():
        images = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.ReLU()]
        return nn.Sequential(*images, nn.Flatten(), nn.Linear(12, 2))

    net = grown(cnn, "ab")
    found = net.lateral_sensitivity([(torch.randn(8, 1, 6, 6), None)], "b")
    torch.testing.assert_close(found.shares.sum(1), torch.ones(2, dtype=torch.float64))
    assert (found.shares > 0).all()
    figure = found.plot(tmp_path / "feeds.png")
    assert (tmp_path / "feeds.png").read_bytes().startswith(b"\x89PNG")
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["a", "b (own)"]
    assert repr(found) == "LateralSensitivity(measure='fisher', task='b', points=['2', '5'])"


def test_refused_measurements():
    net = grown(mlp, "ab")
    x = torch.randn(6, 5)
    for arguments, words in [
        (([(x, None)], "z"), "task must be one that has a column ('a', 'b')"),
        (([], "b"), "batches must give at least one batch, got none"),
        (([(torch.randn(2, 3, 5), None)], "b"), "outputs must be [N, C] to measure laterals"),
    ]:
        with pytest.raises(ValueError, match=re.escape(words)):
            net.lateral_sensitivity(*arguments)
    with pytest.raises(TypeError, match=re.escape("batches must give pairs (inputs, labels)")):
        net.lateral_sensitivity([x], "b")
    with pytest.raises(ValueError, match="measure must be one of 'fisher', 'perturbation'"):
        net.lateral_sensitivity([(x, None)], "b", measure="ablation")
    wrong = (net(x, "b").argmax(1) + 1) % 3
    with pytest.raises(ValueError, match="must be answered better than by chance"):
        net.lateral_sensitivity([(x, wrong)], "b", measure="perturbation")
    found = net.lateral_sensitivity([(x, None)], "a")
    with pytest.raises(ValueError, match="found must be of the last column's task, got that of 'a'"):
        net.prune_laterals(found, 0.1)
    for threshold in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="threshold must"):
            net.prune_laterals(found, threshold)
    assert len(net.columns[1].pairs) == 2
    with pytest.raises(ValueError, match="found must be of the last"):
        ProgressiveNetwork(mlp).prune_laterals(found, 0.1)
