"""A batch normalisation's gradients, of each sample alone, against torch in float64; and the rule that uses them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import limpet
from limpet.fisher.rules import norm as rule
from limpet.ops.batch_norm_grads import batch_norm_grads, is_plain
from test_diagonal_fisher import assert_fisher
from tolerances import assert_close


def wanted(d, x, mean, factor):
    d, x, mean, factor = (t.double() for t in (d, x, mean, factor))
    along = [-1, *[1] * (d.dim() - 2)]
    of_weight, of_bias = d * (x - mean.view(along)), d
    sums = (t.sum(dim=list(range(2, d.dim()))) if d.dim() > 2 else t for t in (of_weight, of_bias))
    return d * factor.view(along), *sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@given(data=st.data())
@settings(max_examples=60)
def test_any_shape(dtype, data):
    draw = data.draw
    shape = [draw(st.integers(0, 5)), draw(st.integers(1, 40)), *draw(st.lists(st.integers(0, 13), max_size=3))]
    d, x = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    if draw(st.booleans()):
        d, x = d.transpose(0, 1).contiguous().transpose(0, 1), x.flip(0).flip(0)
    mean, factor = torch.randn(2, shape[1], dtype=dtype)
    for got, want in zip(batch_norm_grads(d, x, mean, factor), wanted(d, x, mean, factor), strict=True):
        assert_close(got, want)
    dx, of_weight, of_bias = batch_norm_grads(d, None, mean, factor)
    assert of_weight is None
    assert torch.equal(dx, batch_norm_grads(d, x, mean, factor)[0])
    assert torch.equal(of_bias, batch_norm_grads(d, x, mean, factor)[2])


def test_without_places():
    d, (mean, factor) = torch.randn(2, 40, 0, 3), torch.randn(2, 40)
    dx, *sums = batch_norm_grads(d, torch.randn(2, 40, 0, 3), mean, factor)
    assert dx.shape == d.shape
    assert all(torch.equal(each, torch.zeros(2, 40)) for each in sums)


@pytest.mark.parametrize("places", [(20, 21), (4, 4), (4, 5), (2, 3)])
def test_threads_do_not_change_a_bit(places):
    d, x, (mean, factor) = torch.randn(90, 133, *places), torch.randn(90, 133, *places), torch.randn(2, 133)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(batch_norm_grads(d, x, mean, factor))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"output_grad": torch.zeros(2, 3, 4).half()}, TypeError, "output_grad must be float32 or float64"),
        ({"output_grad": torch.zeros(3)}, ValueError, r"output_grad must be \[N, C, \*\]"),
        ({"output_grad": torch.zeros(2, 3, 4, device="meta")}, ValueError, "lie on the CPU"),
        ({"input": torch.zeros(2, 3, 4).double()}, TypeError, "input must be torch.float32"),
        ({"input": torch.zeros(2, 3, 5)}, ValueError, r"input must be \[2, 3, 4\]"),
        ({"mean": torch.zeros(4)}, ValueError, r"mean must be \[3\]"),
        ({"factor": torch.zeros(3).double()}, TypeError, "factor must be torch.float32"),
    ],
)
def test_bad_input(changed, error, words):
    given = {"output_grad": torch.zeros(2, 3, 4), "input": torch.zeros(2, 3, 4), "mean": torch.zeros(3)}
    with pytest.raises(error, match=words):
        batch_norm_grads(**{**given, "factor": torch.zeros(3), **changed})


class _Norms(nn.Module):
    """A normalisation of the input itself, one that is used twice, one without a weight, one over few places."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.BatchNorm2d(3), nn.BatchNorm2d(6)
        self.bias, self.few = nn.Parameter(torch.randn(6)), nn.BatchNorm2d(5)
        self.conv, self.same, self.last = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 5, 5)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        h = self.twice(self.conv(self.first(x))).tanh()
        h = self.twice(self.same(h)).tanh()
        h = F.batch_norm(h, h.new_full((6,), 0.1), h.new_full((6,), 2.0), None, self.bias)
        return self.head(self.few(self.last(h).tanh()).flatten(1))


@pytest.mark.parametrize("labels", ["data", "expected"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=str)
def test_the_fisher_information(dtype, bound, labels, monkeypatch):
    model = _Norms().to(dtype).eval()
    for norm in (model.first, model.twice, model.few):
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    x, y = torch.randn(6, 3, 8, 8, dtype=dtype), torch.randint(4, (6,))
    taken = []
    monkeypatch.setattr(rule, "batch_norm_grads", lambda *args: taken.append(args) or batch_norm_grads(*args))
    got = limpet.diagonal_fisher(model, [(x, y), (x, y)], labels=labels)
    assert all(args[0].shape[2] > 2 for args in taken)
    assert len(taken) >= 6
    want = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    double = model.double()
    for n in range(6):
        logits = double(x[n : n + 1].double())
        p = logits.detach().softmax(dim=1)[0] if labels == "expected" else F.one_hot(y[n], 4).double()
        for label in p.nonzero():
            grads = torch.autograd.grad(F.cross_entropy(logits, label), list(double.parameters()), retain_graph=True)
            for total, grad in zip(want.values(), grads, strict=True):
                total += p[label] * grad.square() / 6
    assert_fisher(got, want, bound)


@pytest.mark.parametrize(
    ("d", "taken"),
    [
        (torch.zeros(2, 3, 8), True),
        (torch.zeros(2, 3, 7), False),
        (torch.zeros(200, 3), False),
        (torch.zeros(2, 3, 8).bfloat16(), False),
        (torch.zeros(2, 8, 3).mT, False),
    ],
)
def test_what_is_plain(d, taken):
    assert is_plain(d, d, torch.zeros(3), torch.zeros(3)) == taken
    assert not is_plain(d, d, torch.zeros(3), torch.zeros(3).double())
