"""Sums added in place: weight and bias in one go, and the way past the dispatcher against the way through it."""

import pytest
import torch
from torch import nn

import limpet
from limpet import ops, reference
from limpet.ops import _fisher_launch as launch
from op_cases import CHANNELS, DTYPES, LINEAR
from tolerances import assert_close

needs_the_short_way = pytest.mark.skipif(launch._PLAIN is None, reason="this torch has no C functions of DLPack")


@pytest.fixture(params=["short", "dispatched"])
def way(request, monkeypatch):
    if request.param == "dispatched":
        monkeypatch.setattr(launch, "_PLAIN", None)


def bias_reference(d):  # [N, *, C] -> [C]
    d = d.double()
    return (d.flatten(1, -2).sum(1) if d.dim() > 2 else d).square().sum(0)


def zeros(*shape, like):
    return torch.zeros(*shape, dtype=reference.wide(like.dtype))


def check_linear(d, a):
    total, bias = zeros(d.shape[-1], a.shape[-1], like=d), zeros(d.shape[-1], like=d)
    assert ops.sum_grad_squared_linear(d, a, into=total, bias_into=bias) is total
    assert_close(total, reference.sum_grad_squared_linear(d.double(), a.double()))
    assert_close(bias, bias_reference(d))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear_with_bias(shape, dtype, way):
    samples, places, rows, columns = shape
    check_linear(torch.randn(samples, places, rows).to(dtype), torch.randn(samples, places, columns).to(dtype))


# More rows or columns than are shared at a time, samples that are cut into segments, and nothing at all.
@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 2100, 9),
        (3, 5, 9, 2100),
        (2, 2500, 13, 70),
        (2, 2500, 70, 13),
        (600, 1, 7, 70),
        (0, 3, 4, 5),
        (4, 3, 1, 0),
    ],
)
def test_linear_with_bias_in_pieces(shape):
    samples, places, rows, columns = shape
    check_linear(torch.randn(samples, places, rows), torch.randn(samples, places, columns))


def test_linear_with_bias_strided(way):
    d, a = torch.randn(9, 4, 13).transpose(0, 1), torch.randn(4, 9, 140)[..., ::2]
    check_linear(d, a)
    check_linear(d.reshape(4, 3, 3, 13), a.reshape(4, 3, 3, 70))
    check_linear(torch.randn(4, 6, 5, 13)[:, ::2], torch.randn(4, 3, 5, 7))  # places without a common stride
    check_linear(torch.randn(4, 70, 40).mT, torch.randn(4, 83, 40).mT)
    check_linear(torch.randn(4, 1, 13)[:, 0], torch.randn(7, 4).t())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 1, 4), (16, 7, 256), (2, 9, 300), (4, 33), (1, 5, 1), (2, 3, 5, 17), (3, 0, 4)], ids=str
)
def test_norm(shape, dtype, way):
    d, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    mean, rstd = (torch.rand(*shape[:-1], 1).to(reference.wide(dtype)) for _ in range(2))
    want = reference.sum_grad_squared_norm(d.double(), x.double(), mean.double(), rstd.double())
    total, bias = zeros(shape[-1], like=d), zeros(shape[-1], like=d)
    assert ops.sum_grad_squared_norm(d, x, mean, rstd, into=total, bias_into=bias) is total
    assert_close(total, want, dtype)
    assert_close(bias, bias_reference(d))
    assert_close(ops.sum_grad_squared_norm(d, x, mean, rstd), want, dtype)


def test_norm_strided(way):
    d, x = torch.randn(9, 4, 21).transpose(0, 1), torch.randn(4, 9, 42)[..., ::2]
    mean, rstd = torch.rand(9, 4, 1).transpose(0, 1), torch.rand(4, 9, 1)
    want = reference.sum_grad_squared_norm(*(t.double() for t in (d, x, mean, rstd)))
    assert_close(ops.sum_grad_squared_norm(d, x, mean, rstd, into=torch.zeros(21)), want)
    same = rstd.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(
        ops.sum_grad_squared_norm(d, d, mean, same, into=torch.zeros(21)), ops.sum_grad_squared_norm(d, d, mean, rstd)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), CHANNELS)
def test_bias_and_scale(shape, channel_dim, dtype, way):
    d, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    size = shape[channel_dim]
    shift = torch.randn(size).to(reference.wide(dtype))
    for function, arguments in (
        (ops.sum_grad_squared_bias, {}),
        (ops.sum_grad_squared_scale, {"input": x}),
        (ops.sum_grad_squared_scale, {"input": x, "shift": shift}),
    ):
        total = torch.ones(size, dtype=reference.wide(dtype))
        assert function(d, **arguments, channel_dim=channel_dim, into=total) is total
        assert_close(total - 1, function(d, **arguments, channel_dim=channel_dim), reference.wide(dtype))
    total, bias = (torch.ones(size, dtype=reference.wide(dtype)) for _ in range(2))
    ops.sum_grad_squared_scale(d, x, channel_dim=channel_dim, shift=shift, into=total, bias_into=bias)
    want = ops.sum_grad_squared_scale(d, x, channel_dim=channel_dim, shift=shift)
    assert_close(total - 1, want, reference.wide(dtype))
    assert_close(bias - 1, ops.sum_grad_squared_bias(d, channel_dim=channel_dim), reference.wide(dtype))


@needs_the_short_way
def test_both_ways_to_the_same_bits(monkeypatch):
    d, a = torch.randn(20, 16, 100), torch.randn(20, 16, 300)
    totals = [torch.ones(100, 300), torch.ones(100, 300)]
    ops.sum_grad_squared_linear(d, a, into=totals[0])
    monkeypatch.setattr(launch, "_PLAIN", None)
    ops.sum_grad_squared_linear(d, a, into=totals[1])
    assert torch.equal(*totals)


@needs_the_short_way
def test_threads_do_not_change_a_bit():
    d, a = torch.randn(30, 16, 100), torch.randn(30, 16, 300)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        totals = [torch.zeros(100, 300), torch.zeros(100), torch.zeros(100), torch.zeros(100)]
        ops.sum_grad_squared_linear(d, a, into=totals[0], bias_into=totals[1])
        ops.sum_grad_squared_norm(d, d, d[..., :1], d[..., 1:2], into=totals[2], bias_into=totals[3])
        results.append(totals)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


class Marked(torch.Tensor):
    """A tensor of a class of its own."""


D, A = torch.randn(4, 3, 5), torch.randn(4, 3, 7)
NEGATIVE = torch.randn(4, 3, 5, dtype=torch.complex64).conj().imag


@needs_the_short_way
@pytest.mark.parametrize(
    ("total", "bias", "d", "a"),
    [
        pytest.param(torch.zeros(7, 5).t(), None, D, A, id="transposed total"),
        pytest.param(torch.zeros(5, 8), None, D, A, id="shape of total"),
        pytest.param(torch.zeros(5, 7, dtype=torch.float64), None, D, A, id="dtype of total"),
        pytest.param(torch.zeros(5, 7), torch.zeros(10)[::2], D, A, id="bias with gaps"),
        pytest.param(torch.zeros(5, 7), torch.zeros(4), D, A, id="shape of bias"),
        pytest.param(torch.zeros(5, 7), None, D, A.double(), id="two dtypes"),
        pytest.param(torch.zeros(5, 7), None, D.long(), A.long(), id="integers"),
        pytest.param(torch.zeros(5, 7), None, D, A[:, :2], id="places"),
        pytest.param(torch.zeros(5, 7), None, D.as_subclass(Marked), A, id="subclass"),
        pytest.param(torch.zeros(5, 7), None, NEGATIVE, A, id="negative"),
        pytest.param(torch.zeros(5, 7), None, D.to("meta"), A.to("meta"), id="meta"),
        pytest.param(torch.zeros(5, 7), None, D.to_sparse(), A, id="sparse"),
        pytest.param(torch.zeros(5, 7), None, None, A, id="None"),
        pytest.param(torch.zeros(5, 7), None, [[1.0]], A, id="list"),
        pytest.param(torch.zeros(5, 7), None, D[0, 0], A[0, 0], id="one dimension"),
    ],
)
def test_the_short_way_takes_nothing_else(total, bias, d, a):
    before = total.clone()
    assert not launch._PLAIN.linear(total, bias, d, a, 1)
    assert torch.equal(total, before)
    assert not launch._PLAIN.bias(torch.zeros(5), d, -1, 1) or d is D


def test_signs_that_only_torch_knows(way):
    total, bias = torch.zeros(5, 7), torch.zeros(5)
    ops.sum_grad_squared_linear(NEGATIVE, A, into=total, bias_into=bias)
    assert_close(total, reference.sum_grad_squared_linear(NEGATIVE.resolve_neg().double(), A.double()))


def test_compiles_whole():
    def sums(d, a):
        return ops.sum_grad_squared_linear(d, a, into=d.new_zeros(5, 7), bias_into=d.new_zeros(5))

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(D, A), ops.sum_grad_squared_linear(D, A))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.sum_grad_squared_linear(D, A, into=torch.zeros(5, 7), bias_into=torch.zeros(7)),
            ValueError,
            r"bias_into must be a contiguous torch.float32 tensor of shape \[5\]",
        ),
        (
            lambda: ops.sum_grad_squared_scale(D, None, into=torch.zeros(5)),
            TypeError,
            "input must be a torch.Tensor, got None",
        ),
        (
            lambda: ops.sum_grad_squared_scale(D, D, into=torch.zeros(5), bias_into=torch.zeros(4)),
            ValueError,
            r"bias_into must be a contiguous torch.float32 tensor of shape \[5\]",
        ),
        (
            lambda: ops.sum_grad_squared_bias(D, channel_dim="last", into=torch.zeros(5)),
            ValueError,
            "channel_dim must be 1 or -1, got 'last'",
        ),
        (
            lambda: ops.sum_grad_squared_norm(D, A, D[..., :1], D[..., :1], into=torch.zeros(5)),
            ValueError,
            "must have the same shape",
        ),
        (
            lambda: ops.sum_grad_squared_norm(D, D, D[..., 0], D[..., :1], into=torch.zeros(5)),
            ValueError,
            r"mean must be a torch.float32 tensor of shape \[4, 3, 1\]",
        ),
        (
            lambda: ops.sum_grad_squared_norm(D, D, D[..., :1], D[..., :1].double(), into=torch.zeros(5)),
            ValueError,
            "rstd must be a torch.float32 tensor",
        ),
    ],
)
def test_bad_input(call, error, message, way):
    with pytest.raises(error, match=message):
        call()


def test_layers_in_a_model_take_it(monkeypatch):
    calls = []
    for name in ("sum_grad_squared_linear", "sum_grad_squared_norm"):
        real = getattr(ops, name)

        def noted(*args, real=real, **kwargs):
            calls.append(kwargs.get("bias_into") is not None)
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, name, noted)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4, bias=False))
    limpet.diagonal_fisher(model, [(torch.randn(8, 6), torch.randint(4, (8,)))])
    assert calls == [False, True, True]


class Gaps(nn.Module):
    """Biases, and a normalisation's factor, that are views of parameters with gaps between their elements."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(6))
        self.factor, self.shift = nn.Parameter(torch.randn(10)), nn.Parameter(torch.randn(10))

    def forward(self, x):
        x = nn.functional.layer_norm(x, (5,), self.factor[::2], self.shift[::2])
        return nn.functional.linear(x, self.weight, self.bias[::2])


def test_views_with_gaps_are_added_apart():
    model, x, y = Gaps().double(), torch.randn(8, 5, dtype=torch.float64), torch.randint(3, (8,))
    fisher = limpet.diagonal_fisher(model, [(x, y)])
    assert set(fisher.routes.values()) == {"fused"}
    for name, p in model.named_parameters():
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        grads = [torch.autograd.grad(loss, p, retain_graph=True)[0] for loss in losses]
        assert_close(fisher[name], torch.stack(grads).square().mean(0))
