"""The gated lateral family against its float64 reference, autograd, the compiler and torch.func."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limpet import ops, reference
from op_cases import DTYPES
from tolerances import assert_close

# (shape, channel_dim): one element, odd sizes, below and above a vector, several runs of lines, empty, images.
SHAPES = [
    ((1, 1), -1),
    ((5, 7), -1),
    ((33,), -1),
    ((3, 4, 35), -1),
    ((600, 70), -1),
    ((3, 17), 1),
    ((2, 20, 3), 1),
    ((2, 6, 5, 7), 1),
    ((3, 5, 2, 3, 20), 1),
    ((2, 3, 9000), 1),
    ((0, 4), -1),
    ((2, 0), -1),
    ((0, 4, 3), 1),
    ((2, 4, 0), 1),
]


def inputs(shape, channel_dim, dtype=torch.float32, *, bias=True):
    """x, h, weight, bias that require grad, and a gradient at y."""
    channels = shape[channel_dim]
    tensors = [torch.randn(shape), torch.randn(shape), torch.randn(channels, channels) / max(channels, 1) ** 0.5]
    tensors += [torch.randn(channels)] if bias else []
    return [t.to(dtype).requires_grad_() for t in tensors], torch.randn(shape).to(dtype)


def check(tensors, grad, channel_dim):
    """Value and gradients are those of the reference in float64, of the dtype of the inputs."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = ops.gated_lateral(*tensors, channel_dim=channel_dim)
    want = reference.gated_lateral(*wide, channel_dim=channel_dim)
    assert y.dtype == tensors[0].dtype
    assert_close(y, want)
    grads = torch.autograd.grad(y, tensors, grad)
    for got, expected in zip(grads, torch.autograd.grad(want, wide, grad.double()), strict=True):
        assert_close(got, expected)
    with torch.no_grad():
        assert torch.equal(ops.gated_lateral(*tensors, channel_dim=channel_dim), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_matches_float64(shape, channel_dim, bias, dtype):
    tensors, grad = inputs(shape, channel_dim, dtype, bias=bias)
    check(tensors, grad, channel_dim)


@given(
    st.lists(st.integers(0, 6), max_size=2), st.integers(1, 70), st.lists(st.integers(1, 20), max_size=2), st.booleans()
)
def test_any_shape(lead, channels, places, first):
    shape = (3, channels, *places) if first else (*lead, channels)
    channel_dim = 1 if first else -1
    check(*inputs(shape, channel_dim), channel_dim)


def test_the_equation():
    """One row by hand: y = x g + h (1 - g), g = sigmoid(W h + b)."""
    (x, h, weight, bias), _ = inputs((3,), -1, torch.float64)
    gate = 1 / (1 + torch.exp(-(weight @ h + bias)))
    assert_close(ops.gated_lateral(x, h, weight, bias), x * gate + h * (1 - gate))


def test_channels_first_is_channels_last_moved():
    (x, h, weight, bias), _ = inputs((2, 20, 5, 7), 1)
    moved = ops.gated_lateral(x.movedim(1, -1), h.movedim(1, -1), weight, bias)
    assert_close(ops.gated_lateral(x, h, weight, bias, channel_dim=1), moved.movedim(-1, 1).double())


@pytest.mark.parametrize("x_last", [True, False])
def test_channels_last_images_stay_so(x_last):
    tensors, grad = inputs((2, 20, 5, 7), 1)
    with torch.no_grad():
        if x_last:
            tensors[0] = tensors[0].to(memory_format=torch.channels_last).requires_grad_()
        tensors[1] = tensors[1].to(memory_format=torch.channels_last).requires_grad_()
    assert ops.gated_lateral(*tensors, channel_dim=1).is_contiguous(memory_format=torch.channels_last)
    check(tensors, grad, 1)


@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 30), -1), ((4, 6, 10), 1)])
def test_strided(shape, channel_dim):
    tensors, grad = inputs(shape, channel_dim)
    tensors = [torch.stack([t.detach(), t.detach()], dim=-1)[..., 0].requires_grad_() for t in tensors]
    check(tensors, grad.transpose(0, 1).contiguous().transpose(0, 1), channel_dim)
    check(tensors, torch.ones(()).expand(shape), channel_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gate_keeps_its_relative_precision(dtype):
    """Far to both sides: with x = 1, h = 0 the result is g, with x = 0, h = 1 it is 1 - g."""
    reach = 86.0 if dtype == torch.float32 else 600.0
    bias = torch.linspace(-reach, reach, 4001, dtype=dtype)
    weight, zeros, ones = torch.zeros(4001, 4001, dtype=dtype), torch.zeros(1, 4001, dtype=dtype), torch.ones(1, 4001)
    z = bias.double()
    for got, want in (
        (ops.gated_lateral(ones.to(dtype), zeros, weight, bias), torch.sigmoid(z)),
        (ops.gated_lateral(zeros, ones.to(dtype), weight, bias), torch.sigmoid(-z)),
    ):
        error = ((got[0].double() - want) / want).abs().max()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("width", [1, 40])
def test_infinite_and_undefined_logits(width):
    bias = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30]).repeat_interleave(width)
    x, h = torch.ones(2, 5 * width), torch.zeros(2, 5 * width)
    y = ops.gated_lateral(x, h, torch.zeros(5 * width, 5 * width), bias).view(2, 5, width)
    want = torch.tensor([1.0, 0.0, torch.nan, 1.0, 0.0]).view(1, 5, 1).expand(2, 5, width)
    torch.testing.assert_close(y, want, equal_nan=True, rtol=0, atol=1e-37)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2, 3), (1, 2)])
@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 30), -1), ((4, 6, 10), 1)])
def test_only_gradients_that_are_asked_for(wanted, shape, channel_dim):
    tensors, grad = inputs(shape, channel_dim)
    all_grads = torch.autograd.grad(ops.gated_lateral(*tensors, channel_dim=channel_dim), tensors, grad)
    for k, tensor in enumerate(tensors):
        tensor.requires_grad_(k in wanted)
    ops.gated_lateral(*tensors, channel_dim=channel_dim).backward(grad)
    for k, tensor in enumerate(tensors):
        assert tensor.grad is None if k not in wanted else torch.equal(tensor.grad, all_grads[k])


def test_backward_twice_and_results_changed_in_place():
    tensors, grad = inputs((6, 30), -1)
    y = ops.gated_lateral(*tensors)
    first = torch.autograd.grad(y, tensors, grad, retain_graph=True)
    y.relu_().mul_(0)  # y is not what backward reads
    for a, b in zip(first, torch.autograd.grad(ops.gated_lateral(*tensors), tensors, grad), strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        quiet = ops.gated_lateral(*tensors)
    quiet += tensors[0]
    assert quiet.requires_grad


@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 5), -1), ((2, 3, 2, 2), 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_twice(shape, channel_dim, bias):
    tensors, _ = inputs(shape, channel_dim, torch.float64, bias=bias)

    def value(*tensors):
        return ops.gated_lateral(*tensors, channel_dim=channel_dim)

    assert torch.autograd.gradcheck(value, tensors)
    assert torch.autograd.gradgradcheck(value, tensors)


@pytest.mark.parametrize(("shape", "channel_dim"), [((700, 100), -1), ((7, 10, 20, 53), 1), ((3, 40_000), -1)])
def test_threads_do_not_change_a_bit(shape, channel_dim):
    """All but the products, which are BLAS's."""
    channels = 8 if shape[-1] == 40_000 else shape[channel_dim]
    shape = (shape[0] * 5000, 8) if shape[-1] == 40_000 else shape
    (x, h, _, bias), grad = inputs(shape, channel_dim)
    weight, results = torch.zeros(channels, channels), []
    x, h, bias = x.detach(), h.detach(), bias.detach()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, product = torch.ops.limpet.gated_lateral(x, h, weight, bias, channel_dim, True)
        wanted = [True, True, False, True]
        grads = torch.ops.limpet.gated_lateral_backward(grad, x, h, weight, bias, product, channel_dim, wanted)
        results.append([y, *grads])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_bias_gradient_does_not_drift_over_many_rows():
    h = torch.zeros(400_000, 3)
    bias = torch.zeros(3, requires_grad=True)
    ops.gated_lateral(torch.full_like(h, 0.4), h, torch.zeros(3, 3), bias).sum().backward()
    assert_close(bias.grad, torch.full((3,), 400_000 * float(torch.tensor(0.4)) / 4, dtype=torch.float64))


def test_autocast_is_a_linear_layers():
    tensors, grad = inputs((6, 30), -1)
    narrow = [t.detach().bfloat16().requires_grad_() for t in tensors]
    want = ops.gated_lateral(*narrow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.gated_lateral(*tensors)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, want)
    wanted = torch.autograd.grad(want, narrow, grad.bfloat16())
    for got, expected in zip(torch.autograd.grad(y, tensors, grad.bfloat16()), wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, expected.float())
    wide, _ = inputs((6, 30), -1, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.gated_lateral(*wide).dtype == torch.float64


def test_backward_under_autocast_keeps_float32():
    tensors, grad = inputs((6, 30), -1)
    want = torch.autograd.grad(ops.gated_lateral(*tensors), tensors, grad)
    y = ops.gated_lateral(*tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(y, tensors, grad)
    assert all(map(torch.equal, got, want))


def test_torch_func():
    (x, h, weight, bias), _ = inputs((3, 5), -1, torch.float64)
    tensors = [t.detach() for t in (x, h, weight, bias)]

    def loss(function, *tensors):
        return function(*tensors).square().sum()

    arguments = (0, 1, 2, 3)
    got = torch.func.grad(lambda *t: loss(ops.gated_lateral, *t), argnums=arguments)(*tensors)
    want = torch.func.grad(lambda *t: loss(reference.gated_lateral, *t), argnums=arguments)(*tensors)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)
    several = [torch.stack([t, 2 * t, -t]) for t in tensors]
    assert_close(torch.vmap(ops.gated_lateral)(*several), torch.vmap(reference.gated_lateral)(*several))
    per_sample = torch.vmap(
        torch.func.grad(lambda w, x, h: loss(ops.gated_lateral, x, h, w, tensors[3])), in_dims=(None, 0, 0)
    )
    rows = [per_sample(tensors[2], tensors[0], tensors[1])[k] for k in range(3)]
    assert_close(torch.stack(rows).sum(dim=0), want[2])


def test_batched_gradients():
    tensors, _ = inputs((3, 5), -1, torch.float64)
    y = ops.gated_lateral(*tensors)
    rows = torch.eye(15, dtype=torch.float64).view(15, 3, 5)
    jacobian = torch.autograd.grad(y, tensors[2], rows, is_grads_batched=True, retain_graph=True)[0]
    for k in (0, 7):
        assert_close(jacobian[k], torch.autograd.grad(y, tensors[2], rows[k], retain_graph=True)[0])


@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 30), -1), ((4, 6, 10), 1)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(shape, channel_dim, backend):
    tensors, grad = inputs(shape, channel_dim)

    def function(*tensors):
        return ops.gated_lateral(*tensors, channel_dim=channel_dim) * 2

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    want = torch.autograd.grad(function(*tensors), tensors, grad)
    got = torch.autograd.grad(compiled(*tensors), tensors, grad)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b.double())
    with torch.no_grad():
        assert_close(compiled(*tensors), function(*tensors).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 30), -1), ((4, 6, 10), 1)])
@pytest.mark.parametrize("wanted", [[True] * 4, [False, True, False, False]])
def test_opcheck(shape, channel_dim, dtype, wanted):
    tensors, grad = inputs(shape, channel_dim, dtype)
    x, h, weight, bias = (t.detach() for t in tensors)
    forward, backward = torch.ops.limpet.gated_lateral.default, torch.ops.limpet.gated_lateral_backward.default
    for keep in (True, False):
        torch.library.opcheck(forward, (x, h, weight, bias, channel_dim, keep))
    product = reference.gate_product(h, weight, channel_dim).contiguous()
    torch.library.opcheck(backward, (grad, x, h, weight, bias, product, channel_dim, wanted))


@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 30), -1), ((2, 6, 4, 5), 1)])
def test_devices_without_a_kernel_run_the_reference(shape, channel_dim):
    (x, h, weight, bias), grad = inputs(shape, channel_dim)
    arguments = x.detach(), h.detach(), weight.detach(), bias.detach()
    forward, backward = torch.ops.limpet.gated_lateral.default, torch.ops.limpet.gated_lateral_backward.default
    y, product = forward(*arguments, channel_dim, True)
    from limpet.ops._library import DEFAULTS

    mine = DEFAULTS["gated_lateral"](*arguments, channel_dim, True)
    assert_close(mine[0], y.double())
    assert_close(mine[1], product.double())
    wanted = [True, False, True, True]
    rest = *arguments, product, channel_dim, wanted
    for a, b in zip(DEFAULTS["gated_lateral_backward"](grad, *rest), backward(grad, *rest), strict=True):
        assert_close(a, b.double())


# --- several ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", ["chain", "sum"])
@pytest.mark.parametrize(("shape", "channel_dim"), [((6, 30), -1), ((2, 6, 4, 5), 1)])
def test_several(combine, shape, channel_dim):
    x = inputs(shape, channel_dim)[0][0]
    hs, weights, biases = zip(*(inputs(shape, channel_dim)[0][1:] for _ in range(3)), strict=True)
    got = ops.gated_laterals(x, hs, weights, biases, combine=combine, channel_dim=channel_dim)
    wide = [[t.detach().double() for t in ts] for ts in (hs, weights, biases)]
    assert_close(got, reference.gated_laterals(x.detach().double(), *wide, combine, channel_dim))
    got.sum().backward()
    assert all(t.grad is not None for t in (x, *hs, *weights, *biases))


@pytest.mark.parametrize("combine", ["chain", "sum"])
def test_one_and_none_of_several(combine):
    (x, h, weight, _), _ = inputs((6, 30), -1)
    one = ops.gated_laterals(x, [h], [weight], combine=combine)
    assert torch.equal(one, ops.gated_lateral(x, h, weight))
    assert torch.equal(one, ops.gated_laterals(x, [h], [weight], [None], combine=combine))
    assert ops.gated_laterals(x, [], [], combine=combine) is x


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": None}, TypeError, "x must be a torch.Tensor, got NoneType"),
        ({"h": [1.0]}, TypeError, "h must be a torch.Tensor, got list"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "x must be a float32, float64, bfloat16 or float16"),
        ({"h": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "h must have x's dtype torch.float32, got torch.fl"),
        ({"weight": torch.zeros(3, 3).to_sparse()}, TypeError, "weight must be a dense tensor, got a torch.sparse"),
        ({"bias": torch.zeros(3).half()}, TypeError, "bias must have x's dtype torch.float32, got torch.float16"),
        ({"h": torch.zeros(1, 3)}, ValueError, r"h must be of shape \[2, 3\] beside x.*got.*\[1, 3\]"),
        ({"weight": torch.zeros(3, 4)}, ValueError, r"weight must be of shape \[3, 3\] beside x.*got.*\[3, 4\]"),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must be of shape \[3, 3\]"),
        ({"bias": torch.zeros(1)}, ValueError, r"bias must be of shape \[3\].*got.*\[1\]"),
        ({"h": torch.zeros(2, 3, device="meta")}, ValueError, "h must be on cpu as x is, got.*meta"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias must be on cpu as x is"),
        ({"channel_dim": 0}, ValueError, "channel_dim must be 1 or -1, got 0"),
        ({"channel_dim": 1, "x": torch.zeros(3)}, ValueError, r"x must have a dimension 1, got.*\[3\]"),
        ({"x": torch.zeros(())}, ValueError, "x must have a dimension -1"),
    ],
)
def test_bad_input(change, error, message):
    good = {"x": torch.ones(2, 3), "h": torch.ones(2, 3), "weight": torch.ones(3, 3), "bias": torch.ones(3)}
    arguments = copy.copy(good) | change
    with pytest.raises(error, match=message):
        ops.gated_lateral(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"combine": "mean"}, ValueError, "combine must be one of 'chain', 'sum', got str 'mean'"),
        ({"hs": torch.ones(2, 3)}, TypeError, "hs must be a list or tuple of tensors"),
        ({"weights": []}, ValueError, r"weights must have as many tensors as hs \(1\), got 0"),
        ({"biases": [None, None]}, ValueError, r"biases must have as many tensors as hs \(1\), got 2"),
        ({"hs": [torch.ones(2, 4)]}, ValueError, r"h must be of shape \[2, 3\]"),
    ],
)
def test_bad_input_of_several(change, error, message):
    good = {"x": torch.ones(2, 3), "hs": [torch.ones(2, 3)], "weights": [torch.ones(3, 3)]}
    with pytest.raises(error, match=message):
        ops.gated_laterals(**(good | change))
