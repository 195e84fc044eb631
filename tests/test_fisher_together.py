"""Columns of gradients that take one contraction for all of them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import limpet
from limpet import ops
from limpet.fisher.contributions import Convolution, Matrix, Vector
from limpet.fisher.together import Together
from test_diagonal_fisher import assert_fisher
from tolerances import assert_close

GEOMETRY = ([3, 3], [1, 1], [1, 1], [1, 1], 1)


@pytest.fixture
def contractions(monkeypatch):
    """The shapes of kernels that were contracted."""
    seen = []
    real = ops.sum_grad_squared_conv

    def count(d, x, *args, **kwargs):
        seen.append((d.shape[1], x.shape[1]))
        return real(d, x, *args, **kwargs)

    monkeypatch.setattr(ops, "sum_grad_squared_conv", count)
    return seen


def add_all(columns, x, exchanged=False):
    total, together = torch.zeros(4, 3, 3, 3), Together()
    for d in columns:
        use = Convolution(d, x, *GEOMETRY, exchanged)
        if not together.take(use, lambda: total):
            use.add_to(total)
    together.finish(lambda: total)
    return total


def separately(columns, x):
    return sum(ops.sum_grad_squared_conv(d, x, *GEOMETRY) for d in columns)


def multiples(count):
    """Columns of multiples of zeros and ones; some of the multiples are zero, some channels have no place."""
    places = (torch.rand(5, 4, 6, 6) < 0.6) & (torch.rand(5, 4, 1, 1) < 0.8)
    values = torch.randn(count, 5, 4, 1, 1) * (torch.rand(count, 5, 4, 1, 1) < 0.7)
    return [value * places for value in values]


def test_multiples_take_one_contraction(contractions):
    columns, x = multiples(7), torch.randn(5, 3, 6, 6)
    got = add_all(columns, x)
    assert len(contractions) == 1
    assert_close(got, separately(columns, x))


def value_more(d):
    d[2, 1].flatten()[3] += 1


def place_less(d):
    d[2, 1, :, :3] = 0


def other_place(d):
    d[2, 1] = torch.eye(6)


@pytest.mark.parametrize("spoil", [value_more, place_less, other_place])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_what_is_no_multiple_ends_it(spoil, at, contractions):
    columns, x = multiples(7), torch.randn(5, 3, 6, 6)
    for d in columns:
        d[2, 1] = torch.randn(())
    spoil(columns[at])
    got = add_all(columns, x)
    assert len(contractions) > 1
    assert_close(got, separately(columns, x))


def test_a_gradient_in_the_place_of_the_input_is_not_held_back(contractions):
    """Of a transposed convolution: what is constant there is no gradient."""
    constant = torch.ones(5, 4, 6, 6)
    xs = [torch.randn(5, 3, 6, 6) for _ in range(3)]
    total, together = torch.zeros(4, 3, 3, 3), Together()
    for x in xs:
        use = Convolution(constant, x, *GEOMETRY, exchanged=True)
        assert not together.take(use, lambda: total)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    columns = multiples(2)
    columns[1][:] = value
    assert not add_all(columns, torch.randn(5, 3, 6, 6)).isfinite().all()


def test_matrices_and_vectors():
    """Without places they are held back; with places each is added by itself."""
    total, together = torch.zeros(4, 3), Together()
    uses = [Matrix(torch.randn(5, 4), torch.ones(5, 3)) for _ in range(3)]
    assert all(together.take(use, lambda: total) for use in uses)
    together.finish(lambda: total)
    assert_close(total, sum(use.output_grad.square().sum(0) for use in uses).unsqueeze(1).expand(4, 3))
    total, together = torch.zeros(4), Together()
    uses = [Vector(torch.randn(5, 4), None, -1, torch.full((4,), 3.0)) for _ in range(3)]
    assert all(together.take(use, lambda: total) for use in uses)
    together.finish(lambda: total)
    assert_close(total, 9 * sum(use.output_grad.square().sum(0) for use in uses))
    assert not Together().take(Vector(torch.ones(5, 2, 4), None, -1), lambda: total)
    assert not Together().take(Vector(torch.ones(5, 4), torch.ones(5, 4), -1), lambda: total)
    assert not Together().take(Matrix(torch.ones(5, 2, 4), torch.ones(5, 2, 3)), lambda: total)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_a_network_with_global_average_pooling(dtype, bound, contractions):
    layers = [nn.Conv2d(3, 7, 3), nn.ReLU(), nn.ConvTranspose2d(7, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3)]
    layers += [nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)]
    model = nn.Sequential(*layers).to(dtype).eval()
    batches = [torch.randn(size, 3, 9, 9, dtype=dtype) for size in (6, 6, 6, 4)]
    got = limpet.diagonal_fisher(model, [(x, None) for x in batches], labels="expected")
    del contractions[: contractions.index((5, 6)) + 1]  # the first batch's
    assert contractions.count((7, 3)) == 3 * contractions.count((5, 6)) == 9  # three batches of three columns
    double, want = copy.deepcopy(model).double(), None
    for x in torch.cat(batches).double().split(1):
        logits = double(x)
        for label, p in enumerate(logits.detach().softmax(dim=1)[0]):
            loss = F.cross_entropy(logits, torch.tensor([label]))
            grads = torch.autograd.grad(loss, list(double.parameters()), retain_graph=True)
            squares = [p * grad.square() / 22 for grad in grads]
            want = squares if want is None else [a + b for a, b in zip(want, squares, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    assert_fisher(got, dict(zip(names, want, strict=True)), bound)
