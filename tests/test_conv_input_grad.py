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
from limpet.ops.conv_input_grad import conv_input_grad, is_faster, is_plain
from test_diagonal_fisher import assert_fisher
from tolerances import assert_close

ONE, TWO = (1, 1), (2, 2)


def wanted(d, w, size, stride=ONE, padding=ONE):
    shape = (d.shape[0], w.shape[1], *size)
    return torch.nn.grad.conv2d_input(shape, w.double(), d.double(), stride=stride, padding=padding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
@settings(max_examples=60)
def test_any_shape(dtype, data):
    """Large tiles take many samples or places; both sizes of tiles and steps of two are drawn."""
    draw = data.draw
    stride = draw(st.sampled_from([ONE, TWO]))
    padding = ONE if stride == TWO else draw(st.tuples(*[st.integers(0, 2)] * 2))
    size = draw(st.tuples(*[st.integers(3, 30)] * 2))
    w = torch.randn(draw(st.integers(1, 80)), draw(st.integers(1, 140)), 3, 3, dtype=dtype)
    output = ((x + 2 * p - 3) // s + 1 for x, p, s in zip(size, padding, stride, strict=True))
    d = torch.randn(draw(st.sampled_from([1, 2, 5, 20])), w.shape[0], *output, dtype=dtype)
    assert_close(conv_input_grad(d, w, size, stride, padding), wanted(d, w, size, stride, padding))


@pytest.mark.parametrize(
    ("samples", "out_channels", "in_channels", "size"),
    [
        (2, 200, 16, (30, 20)),
        (1, 16, 16, (3, 300)),
        (70, 16, 16, (1, 1)),
        (4, 130, 20, (45, 50)),
        (0, 16, 16, (8, 8)),
        (3, 16, 0, (8, 8)),
    ],
)
def test_strips_and_segments(samples, out_channels, in_channels, size):
    for stride in (ONE, TWO):
        output = [(x - 1) // stride[0] + 1 for x in size]
        w, d = torch.randn(out_channels, in_channels, 3, 3), torch.randn(samples, out_channels, *output)
        got = conv_input_grad(d, w, size, stride, ONE)
        assert got.shape == (samples, in_channels, *size)
        if got.numel():
            assert_close(got, wanted(d, w, size, stride))


@pytest.mark.parametrize(
    ("samples", "stride", "bound"), [(1, ONE, 4e-7), (40, ONE, 1e-6), (1, TWO, 4e-7)], ids=["small", "large", "steps"]
)
def test_its_error(samples, stride, bound):
    w, d = torch.randn(256, 64, 3, 3), torch.randn(samples, 256, 16 // stride[0], 16 // stride[0])
    want = wanted(d, w, (16, 16), stride)
    assert (conv_input_grad(d, w, (16, 16), stride, ONE) - want).norm() < bound * want.norm()


def test_kernels_in_any_order_of_memory():
    w, d = torch.randn(3, 3, 20, 24).permute(2, 3, 0, 1), torch.randn(30, 20, 9, 9)
    assert_close(conv_input_grad(d, w, (9, 9), ONE, ONE), wanted(d, w, (9, 9)))


def test_more_channels_than_are_taken_at_a_time():
    for samples, stride in ((8, ONE), (1, ONE), (8, TWO)):
        w, d = torch.randn(900, 700, 3, 3), torch.randn(samples, 900, 8 // stride[0], 8 // stride[0])
        assert_close(conv_input_grad(d, w, (8, 8), stride, ONE), wanted(d, w, (8, 8), stride))


@pytest.mark.parametrize(("samples", "size", "stride"), [(1, (18, 11), ONE), (30, (18, 11), ONE), (7, (9, 6), TWO)])
def test_threads_do_not_change_a_bit(samples, size, stride):
    w, d = torch.randn(40, 70, 3, 3), torch.randn(samples, 40, *size)
    size = [s * stride[0] for s in size]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(conv_input_grad(d, w, size, stride, ONE))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_batches_do_not_change_a_bit():
    """Of tiles of one size: with more samples larger tiles are taken, which round otherwise."""
    for size, samples in ((6, 5), (30, 60)):
        w, d = torch.randn(40, 70, 3, 3), torch.randn(samples, 40, size, size)
        together = conv_input_grad(d, w, (size, size), ONE, ONE)
        half = samples // 2 + 1
        parts = [conv_input_grad(part, w, (size, size), ONE, ONE) for part in (d[:half], d[half:])]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize(
    ("d", "w", "size", "stride", "padding", "error", "words"),
    [
        (torch.zeros(1, 2, 3, 3).bfloat16(), torch.zeros(2, 1, 3, 3), (3, 3), ONE, ONE, TypeError, "output_grad must"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3).double(), (3, 3), ONE, ONE, TypeError, "weight must be"),
        (torch.zeros(2, 3, 3), torch.zeros(2, 1, 3, 3), (3, 3), ONE, ONE, ValueError, "output_grad must have four"),
        (torch.zeros(1, 2, 3, 3).to("meta"), torch.zeros(2, 1, 3, 3), (3, 3), ONE, ONE, ValueError, "on the CPU"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(3, 1, 3, 3), (3, 3), ONE, ONE, ValueError, r"weight must be \[2, C, 3"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 2), (3, 3), ONE, ONE, ValueError, r"weight must be \[2, C, 3"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), (3, 3), ONE, (1, 3), ValueError, "stride must be"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), (5, 5), TWO, (1, 0), ValueError, "stride must be"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), (5, 5), (1, 2), ONE, ValueError, "stride must be"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 3, 3), (4, 5), TWO, ONE, ValueError, "input_size must fit"),
    ],
)
def test_bad_input(d, w, size, stride, padding, error, words):
    with pytest.raises(error, match=words):
        conv_input_grad(d, w, size, stride, padding)


def test_gradients_in_any_order_of_memory_and_of_nothing():
    w, d = torch.randn(20, 24, 3, 3), torch.randn(2, 9, 9, 20).permute(0, 3, 1, 2)
    assert_close(conv_input_grad(d, w, (9, 9), ONE, ONE), wanted(d, w, (9, 9)))
    assert torch.equal(conv_input_grad(d[:, :0], w[:0], (9, 9), ONE, ONE), torch.zeros(2, 24, 9, 9))
    assert conv_input_grad(torch.zeros(1, 20, 0, 5), w, (0, 5), ONE, ONE).shape == (1, 24, 0, 5)


LEFT_TO_TORCH = {
    "few channels": (lambda: torch.randn(30, 8, 8, 8), (16, 8, 3, 3), {}),
    "few tiles": (lambda: torch.randn(2, 16, 9, 9), (16, 16, 3, 3), {"padding": 1}),
    "steps whose tiles reach far over the end": (
        lambda: torch.randn(30, 16, 9, 9),
        (16, 16, 3, 3),
        {"padding": 1, "stride": 2},
    ),
    "steps without padding": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"stride": 2}),
    "steps of three": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"stride": 3, "padding": 1}),
    "dilation": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"dilation": 2}),
    "groups": (lambda: torch.randn(30, 32, 9, 9), (32, 16, 3, 3), {"groups": 2}),
    "padding": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"padding": 3}),
    "kernel": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 2), {}),
    "channels last": (lambda: torch.randn(30, 9, 9, 16).permute(0, 3, 1, 2), (16, 16, 3, 3), {}),
    "bfloat16": (lambda: torch.randn(30, 16, 9, 9, dtype=torch.bfloat16), (16, 16, 3, 3), {}),
}


TAKEN = {
    "taken": (lambda: torch.randn(30, 16, 9, 9), (16, 16, 3, 3), {"padding": 1}),
    "few places": (lambda: torch.randn(64, 16, 4, 4), (16, 16, 3, 3), {"padding": 1}),
    "steps of two": (lambda: torch.randn(30, 16, 7, 8), (16, 16, 3, 3), {"padding": 1, "stride": 2}),
}


def direct_call(make, shape, geometry):
    """A call of the rule, an output's gradient, the input, and torch's gradient at it."""
    x = make().requires_grad_()
    w = torch.randn(shape).to(x.dtype)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
    y = convolve(x, w, **geometry)
    d = torch.randn_like(y)
    (want,) = torch.autograd.grad(y, x, d)
    dims = len(shape) - 2
    pairs = {k: [geometry.get(k, v)] * dims for k, v in (("stride", 1), ("padding", 0), ("dilation", 1))}
    groups = geometry.get("groups", 1)
    return Conv((None, None), w, None, *pairs.values(), [0] * dims, groups, transposed=False), d, x.detach(), want


@pytest.mark.parametrize("name", [*LEFT_TO_TORCH, *TAKEN])
def test_the_rule_for_convolutions_gives_the_gradient_of_either_way(name):
    call, d, x, want = direct_call(*{**LEFT_TO_TORCH, **TAKEN}[name])
    faster = is_faster(d, x, call.w, call.stride, call.padding, call.dilation)
    assert (faster and is_plain(d, x, call.w) and call.groups == 1) == (name in TAKEN)
    assert_close(call.input_grad(d, (x,)), want)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(9,), (70,), (5, 6), (9, 8), (9, 8, 7)], ids=str)
def test_kernels_of_one_element(size, stride):
    dims = len(size)
    make, shape = (lambda: torch.randn(3, 5, *size, dtype=torch.float64)), (4, 5, *[1] * dims)
    call, d, x, want = direct_call(make, shape, {"stride": stride})
    assert is_plain(d, x, call.w)
    assert_close(call.input_grad(d, (x,)), want)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("labels", ["data", "expected"])
def test_the_fisher_information_of_a_network_that_takes_tiles(dtype, bound, labels, monkeypatch):
    """Both sizes of tiles, steps of two, a kernel of one element, and places that are left out."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 40, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(40, 33, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(33, 32, 1, stride=2), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)]
    model = nn.Sequential(*layers).to(dtype)
    batch = torch.randn(32, 3, 16, 16, dtype=dtype), torch.randint(4, (32,))
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
