"""Progressive networks: what is published, what is frozen, and what a column may be asked."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from columns import grown, mlp, normalised, parts, train
from limpet import ProgressiveNetwork
from tolerances import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_nothing_about_the_first_task_changes_while_four_more_are_learned(lateral):
    net = ProgressiveNetwork(normalised, lateral=lateral)
    net.add_column(1)
    train(net, 1)
    net.eval()
    x = torch.randn(64, 5)
    answer, first = net(x, 1), parts(net.columns[0])
    net.freeze()
    for task in (2, 3, 4, 5):
        net.add_column(task)
        before = parts(net.columns[-1])
        train(net, task)
        assert any(not torch.equal(before[name], tensor) for name, tensor in parts(net.columns[-1]).items())
        net.freeze()
    for mode in (True, False):
        net.train(mode)
        assert torch.equal(net(x, 1), answer)
    assert first.keys() == parts(net.columns[0]).keys()
    for name, tensor in parts(net.columns[0]).items():
        assert torch.equal(tensor, first[name]), name


def test_only_the_last_column_learns_whatever_is_asked_of_the_network():
    net = grown(normalised)
    net.train().requires_grad_(True)
    assert not any(module.training for column in list(net.columns)[:2] for module in column.modules())
    assert all(module.training for module in net.columns[2].modules())
    net(torch.randn(4, 5), "c").sum().backward()
    assert {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None} == {"2"}
    assert {name.split(".")[1] for name, p in net.named_parameters() if p.requires_grad} == {"2"}
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())


def published(net, x):
    """Rusu et al. 2016, eq. 2, by hand: all columns side by side, layer by layer."""
    weights = {name: tensor.detach() for name, tensor in net.named_parameters()}
    layers, below = ["0", "2", "4"], [x] * len(net.columns)
    for depth, layer in enumerate(layers):
        here = []
        for k in range(len(net.columns)):
            h = (
                below[k] @ weights[f"columns.{k}.network.{layer}.weight"].T
                + weights[f"columns.{k}.network.{layer}.bias"]
            )
            if depth > 0 and k > 0:
                lateral = f"columns.{k}.laterals.{depth - 1}"
                scaled = torch.cat([weights[f"{lateral}.sources.{j}.alpha"] * below[j] for j in range(k)], 1)
                v = torch.cat([weights[f"{lateral}.sources.{j}.projection.weight"] for j in range(k)], 1)
                h = h + (scaled @ v.T).tanh() @ weights[f"{lateral}.up.weight"].T
            here.append(h)
        below = [h.relu() for h in here]
    return here


def test_the_published_equations():
    net = ProgressiveNetwork(lambda width: mlp(width).double(), activation=torch.tanh)
    for task, width in enumerate((8, 6, 11)):
        net.add_column(task, width=width)
        net.freeze()
    x = torch.randn(7, 5, dtype=torch.float64)
    for task, want in enumerate(published(net, x)):
        torch.testing.assert_close(net(x, task), want, rtol=1e-12, atol=1e-12)


def test_gates_and_sums_by_hand():
    x = torch.randn(7, 5, dtype=torch.float64)
    for lateral in ("gated", "sum"):
        net = grown(lambda: mlp().double(), lateral=lateral, lateral_points=["2"])
        assert {name for name, _ in net.columns[2].laterals.named_parameters()} == (
            {f"0.sources.{j}.{kind}" for j in (0, 1) for kind in ("weight", "bias")} if lateral == "gated" else set()
        )
        middle = []
        for k, column in enumerate(net.columns):
            y = F.linear(column.network[:2](x), column.network[2].weight, column.network[2].bias)
            for j, h in enumerate(middle):
                if lateral == "sum":
                    y = y + h
                else:
                    gate = column.laterals["0"].sources[str(j)]
                    g = torch.sigmoid(h @ gate.weight.T + gate.bias)
                    y = y * g + h * (1 - g)
            middle.append(y)
            want = column.network[4](y.relu())
            torch.testing.assert_close(net(x, "abc"[k]), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_laterals_matter_and_learn(lateral):
    net = grown(lateral=lateral)
    x = torch.randn(9, 5)
    before = net(x, "c")
    before.sum().backward()
    for name, parameter in net.columns[2].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    with torch.no_grad():
        for parameter in net.columns[0].parameters():
            parameter.zero_()
    assert not torch.equal(net(x, "c"), before)
    assert not torch.equal(net(x, "b"), grown(lateral=lateral)(x, "b"))


def test_a_zeroed_lateral_carries_nothing():
    net = grown()
    x = torch.randn(9, 5)
    with torch.no_grad():
        for lateral in net.columns[2].laterals.values():
            for source in lateral.sources.values():
                source.alpha.zero_()
    alone = copy.deepcopy(net.columns[2].network)
    for module in alone.modules():
        module._forward_hooks.clear()
    torch.testing.assert_close(net(x, "c"), alone(x))


def test_gradients_of_inputs_are_whole():
    """They flow through frozen columns, too."""
    net = grown(lambda: mlp().double())
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: net(x, "c"), x)
    net.freeze()
    assert torch.autograd.gradcheck(lambda x: net(x, "b"), x)
    assert not net(x.detach(), "c").requires_grad


def test_columns_that_are_not_read_do_not_run():
    net = grown()
    ran = []
    for number, column in enumerate(net.columns):
        column.network.register_forward_hook(lambda *_, number=number: ran.append(number))
    net(torch.randn(2, 5), "b")
    assert ran == [0, 1]


def test_other_widths_and_depths():
    def column(widths):
        sizes = [5, *widths]
        layers = [nn.Sequential(nn.Linear(m, n), nn.ReLU()) for m, n in zip(sizes, widths, strict=False)]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    net = ProgressiveNetwork(column, example=torch.zeros(2, 5))
    for task, widths in enumerate([[8, 4], [3, 7, 6], [5]]):
        net.add_column(task, widths=widths)
        assert net(torch.randn(4, 5), task).shape == (4, 2)
        net.freeze()
    assert sorted(net.columns[1].pairs) == [(0, 0), (1, 0)]  # the first column has no third lateral point
    assert sorted(net.columns[2].pairs) == [(0, 0), (0, 1)]
    own = [sum(p.numel() for p in column(widths).parameters()) for widths in ([8, 4], [3, 7, 6], [5])]
    sizes = net.parameters_per_column()
    assert sizes[0] == own[0]
    assert sizes[1] == own[1] + (8 * 3 + 1 + 3 * 7) + (4 * 7 + 1 + 7 * 6)
    assert sizes[2] == own[2] + (8 * 5 + 1 + 3 * 5 + 1 + 5 * 2)


def test_compiled_it_answers_and_learns_alike():
    net = grown(tasks="ab")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 5)
    answer = compiled(x, "b")
    assert_close(answer, net(x, "b"))
    answer.square().sum().backward()
    got = {name: p.grad.clone() for name, p in net.columns[1].named_parameters()}
    net.zero_grad()
    net(x, "b").square().sum().backward()
    for name, parameter in net.columns[1].named_parameters():
        assert_close(got[name], parameter.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("lateral", ["adapter", "gated"])
def test_other_dtypes(dtype, lateral):
    """New columns follow the network, and its answers follow those of float64."""
    net = ProgressiveNetwork(mlp, lateral=lateral).to(dtype)
    for task in "abc":
        net.add_column(task)
        assert {p.dtype for p in net.parameters()} == {dtype}
        net.freeze()
    x = torch.randn(16, 5).to(dtype)
    wide = copy.deepcopy(net).double()
    assert_close(net(x, "c"), wide(x.double(), "c"), dtype)


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_autocast_answers_in_half_precision(lateral):
    net = grown(lateral=lateral)
    x = torch.randn(16, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = net(x, "c")
    assert half.dtype == torch.bfloat16
    assert_close(half, net(x, "c"), torch.bfloat16)
    half.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.columns[2].parameters())


def test_a_copy_is_whole():
    net = grown()
    other = copy.deepcopy(net)
    x = torch.randn(4, 5)
    assert torch.equal(other(x, "c"), net(x, "c"))
    with torch.no_grad():
        other.columns[0].network[0].weight.zero_()
    assert not torch.equal(other(x, "c"), net(x, "c"))
    other.freeze()
    other.add_column("d")
    assert net.tasks == ["a", "b", "c"]


def test_the_surest_column_answers_where_no_task_is_given():
    net = grown(infer="entropy")
    x = torch.randn(50, 5)
    answers = torch.stack([net(x, task) for task in "abc"])
    entropy = torch.distributions.Categorical(logits=answers).entropy()
    chosen = entropy.argmin(0)
    assert len(chosen.unique()) > 1
    assert torch.equal(net(x), answers[chosen, torch.arange(50)])
    assert net.infer_task(x) == ["abc"[number] for number in chosen.tolist()]


def test_inputs_of_several_tensors():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

        def forward(self, x, y):
            return self.second(self.first(x + y).relu())

    net = grown(Sum, lateral_points=["second"])
    x, y = torch.randn(2, 6, 5)
    assert torch.equal(net((x, y), "c"), net({"x": x, "y": y}, "c"))
    assert not torch.equal(net((x, y), "c"), net((x, x), "c"))
