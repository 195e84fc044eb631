"""The gradient at the input of convolutions with kernels of 3 x 3, against torch in float64."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import limpet
from limpet.fisher.rules import conv as rule
from limpet.fisher.rules.conv import Conv
from limpet.ops.conv_input_grad import conv_input_grad, is_faster
from test_diagonal_fisher import assert_fisher
from tolerances import assert_close


def wanted(d, w, padding, size):
    shape = (d.shape[0], w.shape[1], *size)
    return torch.nn.grad.conv2d_input(shape, w.double(), d.double(), padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
@settings(max_examples=40)
def test_any_shape(dtype, data):
    draw = data.draw
    padding = draw(st.tuples(*[st.integers(0, 2)] * 2))
    size = draw(st.tuples(*[st.integers(3, 21)] * 2))
    w = torch.randn(draw(st.integers(1, 80)), draw(st.integers(1, 140)), 3, 3, dtype=dtype)
    d = torch.randn(draw(st.integers(1, 5)), w.shape[0], *(x + 2 * p - 2 for x, p in zip(size, padding, strict=True)))
    d = d.to(dtype)
    assert_close(conv_input_grad(d, w, padding), wanted(d, w, padding, size))


@pytest.mark.parametrize(
    ("samples", "out_channels", "in_channels", "size"),
    [(2, 200, 16, (30, 20)), (1, 16, 16, (3, 300)), (70, 16, 16, (1, 1)), (0, 16, 16, (8, 8)), (3, 16, 0, (8, 8))],
)
def test_strips_and_segments(samples, out_channels, in_channels, size):
    w, d = torch.randn(out_channels, in_channels, 3, 3), torch.randn(samples, out_channels, *size)
    got = conv_input_grad(d, w, (1, 1))
    assert got.shape == (samples, in_channels, *size)
    if got.numel():
        assert_close(got, wanted(d, w, (1, 1), size))


def test_its_error_is_that_of_a_direct_convolution():
    w, d = torch.randn(64, 64, 3, 3), torch.randn(8, 64, 16, 16)
    want = wanted(d, w, (1, 1), (16, 16))
    direct = torch.nn.grad.conv2d_input((8, 64, 16, 16), w, d, padding=1)
    assert (conv_input_grad(d, w, (1, 1)) - want).norm() < 2 * (direct - want).norm()


def test_kernels_in_any_order_of_memory():
    w, d = torch.randn(3, 3, 20, 24).permute(2, 3, 0, 1), torch.randn(30, 20, 9, 9)
    assert_close(conv_input_grad(d, w, (1, 1)), wanted(d, w, (1, 1), (9, 9)))


def test_threads_do_not_change_a_bit():
    w, d = torch.randn(40, 70, 3, 3), torch.randn(5, 40, 18, 11)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(conv_input_grad(d, w, (1, 1)))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_batches_do_not_change_a_bit():
    w, d = torch.randn(40, 70, 3, 3), torch.randn(5, 40, 6, 6)
    together = conv_input_grad(d, w, (1, 1))
    assert all(torch.equal(conv_input_grad(d[n : n + 1], w, (1, 1)), together[n : n + 1]) for n in range(5))


@pytest.mark.parametrize(
    ("d", "w", "padding", "error", "words"),
    [
        (torch.zeros(1, 2, 3, 3, dtype=torch.bfloat16), torch.zeros(2, 1, 3, 3), (1, 1), TypeError, "output_grad must"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3).double(), (1, 1), TypeError, "weight must be float32"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 1, 3, 3), (1, 1), ValueError, "output_grad must have four dimensions"),
        (torch.zeros(1, 2, 3, 3, device="meta"), torch.zeros(2, 1, 3, 3), (1, 1), ValueError, "on the CPU"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(3, 1, 3, 3), (1, 1), ValueError, r"weight must be \[2, C, 3, 3\]"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 2), (1, 1), ValueError, r"weight must be \[2, C, 3, 3\]"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), (1, 3), ValueError, "padding must be two integers"),
    ],
)
def test_bad_input(d, w, padding, error, words):
    with pytest.raises(error, match=words):
        conv_input_grad(d, w, padding)


def test_gradients_in_any_order_of_memory_and_of_nothing():
    w, d = torch.randn(20, 24, 3, 3), torch.randn(2, 9, 9, 20).permute(0, 3, 1, 2)
    assert_close(conv_input_grad(d, w, (1, 1)), wanted(d, w, (1, 1), (9, 9)))
    assert torch.equal(conv_input_grad(d[:, :0], w[:0], (1, 1)), torch.zeros(2, 24, 9, 9))
    assert conv_input_grad(torch.zeros(1, 20, 1, 5), w, (2, 1)).shape == (1, 24, 0, 5)


LEFT_TO_TORCH = {
    "few channels": (lambda: torch.randn(30, 8, 8, 8), (16, 8, 3, 3), {}),
    "few places": (lambda: torch.randn(200, 16, 4, 4), (16, 16, 3, 3), {"padding": 1}),
    "few tiles": (lambda: torch.randn(2, 16, 9, 9), (16, 16, 3, 3), {"padding": 1}),
    "steps": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"stride": 2}),
    "dilation": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"dilation": 2}),
    "groups": (lambda: torch.randn(30, 32, 9, 9), (32, 16, 3, 3), {"groups": 2}),
    "padding": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"padding": 3}),
    "kernel": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 2), {}),
    "channels last": (lambda: torch.randn(30, 9, 9, 16).permute(0, 3, 1, 2), (16, 16, 3, 3), {}),
    "bfloat16": (lambda: torch.randn(30, 16, 9, 9, dtype=torch.bfloat16), (16, 16, 3, 3), {}),
}


@pytest.mark.parametrize("name", [*LEFT_TO_TORCH, "taken"])
def test_the_rule_for_convolutions_gives_the_gradient_of_either_way(name):
    make, shape, geometry = LEFT_TO_TORCH.get(name, (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"padding": 1}))
    x = make().requires_grad_()
    w = torch.randn(shape).to(x.dtype)
    y = F.conv2d(x, w, **geometry)
    d = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, x, d)
    pairs = {k: [geometry.get(k, v)] * 2 for k, v in (("stride", 1), ("padding", 0), ("dilation", 1))}
    groups = geometry.get("groups", 1)
    assert is_faster(d, x, w, *pairs.values(), groups) == (name == "taken")
    call = Conv((None, None), w, None, *pairs.values(), [0, 0], groups, transposed=False)
    assert_close(call.input_grad(d, (x.detach(),)), want)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("labels", ["data", "expected"])
def test_the_fisher_information_of_a_network_that_takes_tiles(dtype, bound, labels, monkeypatch):
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 40, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(40, 33, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(33, 4)]
    model = nn.Sequential(*layers).to(dtype)
    batch = torch.randn(20, 3, 12, 12, dtype=dtype), torch.randint(4, (20,))
    taken = []
    monkeypatch.setattr(rule, "conv_input_grad", lambda *args: taken.append(args) or conv_input_grad(*args))
    got = limpet.diagonal_fisher(model, [batch] * 3, labels=labels)
    assert taken
    assert_fisher(got, by_definition(copy.deepcopy(model).double(), batch[0].double(), batch[1], labels), bound)


def by_definition(model, x, y, labels):
    """Each sample alone: the squared gradients of its label's loss, or of all labels' by their probability."""
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(x)):
        logits = model(x[n : n + 1])
        p = logits.detach().softmax(dim=1)[0] if labels == "expected" else F.one_hot(y[n], logits.shape[1])
        for label in p.nonzero():
            grads = torch.autograd.grad(F.cross_entropy(logits, label), list(model.parameters()), retain_graph=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                total += p[label] * grad.square() / len(x)
    return sums
