"""The quadratic family against its float64 reference, autograd, the compiler and torch.func."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import ops, reference
from op_cases import RESNET18_SHAPES, quadratic_inputs
from tolerances import RELATIVE_ERROR, assert_close

SHAPES = [(), (1,), (0,), (3, 5), (7, 0, 2), (16384,), (16385,), (40000,), (64, 3, 3, 3)]
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def expected(params, anchors, importances, strength):
    """Value and gradients in float64."""
    wide = [[t.detach().double() for t in tensors] for tensors in (params, anchors, importances)]
    value = reference.quadratic_penalty(*wide, strength)
    return value, reference.quadratic_penalty_grad(*wide, strength, torch.tensor(1.0))


@pytest.mark.parametrize(
    "dtypes", [(torch.float64,) * 3, *itertools.product(NARROW, NARROW, NARROW)], ids=lambda d: "-".join(map(str, d))
)
def test_value_and_gradient_match_float64(dtypes):
    tensors = quadratic_inputs(SHAPES, *dtypes)
    params = tensors[0]
    value, grads = expected(*tensors, strength=3.0)

    got = ops.quadratic_penalty(*tensors, 3.0)
    got.backward()
    assert got.dtype == reference.wide(dtypes[0])
    assert_close(got, value)
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, grad)

    before = [torch.randn(p.shape).to(p.dtype) for p in params]
    for param, grad in zip(params, before, strict=True):
        param.grad = grad.clone()
    added = ops.add_quadratic_penalty_grad_(*tensors, 3.0)
    assert added.item() == got.item()
    for param, was, grad in zip(params, before, grads, strict=True):
        assert_close(param.grad, was.double() + grad)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5),
    strength=st.just(0.0) | st.floats(1e-6, 1e6),
)
@settings(max_examples=40)
def test_any_list_of_shapes(shapes, strength):
    tensors = quadratic_inputs(shapes)
    value, grads = expected(*tensors, strength)
    assert_close(ops.add_quadratic_penalty_grad_(*tensors, strength), value)
    for param, grad in zip(tensors[0], grads, strict=True):
        assert_close(param.grad, grad)


def test_strided_and_channels_last_tensors():
    base = torch.randn(6, 8)
    image = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    params = [base.t().requires_grad_(), base[:, ::2].clone().t().requires_grad_(), image.requires_grad_()]
    anchors = [torch.randn(8, 6), torch.randn(4, 6), torch.randn(4, 3, 5, 5)]
    importances = [torch.rand(6, 8).t(), torch.rand(4, 6), torch.rand_like(image)]
    value, grads = expected(params, anchors, importances, 2.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    params[0].grad = torch.zeros(6, 16)[:, ::2].t()
    assert_close(ops.add_quadratic_penalty_grad_(params, anchors, importances, 2.0), value)
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, grad)


def test_value_does_not_drift_over_many_elements():
    params, anchors = [torch.full((3_000_001,), 0.1)], [torch.zeros(3_000_001)]
    value = ops.quadratic_penalty(params, anchors, [torch.ones(3_000_001)], 2.0)
    assert_close(value, torch.tensor(3_000_001 * float(torch.tensor(0.1)) ** 2, dtype=torch.float64))


def test_threads_do_not_change_a_bit():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        params, anchors, importances = quadratic_inputs([(100_003,), (5,), (77_777,)])
        value = ops.add_quadratic_penalty_grad_(params, anchors, importances, 5.0)
        results.append([value, *(p.grad for p in params)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck_twice():
    params, anchors, importances = quadratic_inputs([(3, 2), (4,)], torch.float64)

    def value(*params):
        return ops.quadratic_penalty(list(params), anchors, importances, 3.0)

    assert torch.autograd.gradcheck(value, params)
    assert torch.autograd.gradgradcheck(value, params)


def test_only_parameters_that_require_grad_get_one():
    params, anchors, importances = quadratic_inputs([(3,), (4,)])
    params[0].requires_grad_(False)
    ops.quadratic_penalty(params, anchors, importances, 3.0).backward()
    assert params[0].grad is None
    assert_close(params[1].grad, expected(params, anchors, importances, 3.0)[1][1])


def test_torch_func():
    params, anchors, importances = quadratic_inputs([(3, 2)], torch.float64)
    theta = params[0].detach()

    def value(theta):
        return ops.quadratic_penalty([theta], anchors, importances, 3.0)

    assert_close(torch.func.grad(value)(theta), 3.0 * importances[0] * (theta - anchors[0]))
    hessian = torch.func.jacrev(torch.func.jacrev(value))(theta).reshape(6, 6)
    assert_close(hessian, 3.0 * torch.diag(importances[0].flatten()))
    several = torch.stack([theta, 2 * theta, -theta])
    assert_close(torch.vmap(value)(several), torch.stack([value(t) for t in several]))
    assert_close(torch.vmap(torch.func.grad(value))(several), torch.stack([torch.func.grad(value)(t) for t in several]))


def test_compiles_whole():
    params, anchors, importances = quadratic_inputs([(3, 2), (70,)])

    def loss(params):
        return params[0].sum() + ops.quadratic_penalty(params, anchors, importances, 3.0)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want = torch.autograd.grad(loss(params), params)
    got = torch.autograd.grad(compiled(params), params)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    tensors = [[t.detach() for t in ts] for ts in quadratic_inputs([(3, 2), (70,)], dtype, torch.float32)]
    grads = [torch.zeros_like(p) for p in tensors[0]]
    torch.library.opcheck(torch.ops.limpet.quadratic_penalty.default, (*tensors, 3.0))
    torch.library.opcheck(torch.ops.limpet.quadratic_penalty_grad.default, (*tensors, 3.0, torch.tensor(2.0)))
    torch.library.opcheck(torch.ops.limpet.add_quadratic_penalty_grad_.default, (tensors[0], grads, *tensors[1:], 3.0))


def test_allocates_nothing_beyond_the_gradients():
    params, anchors, importances = quadratic_inputs(RESNET18_SHAPES)
    for param in params:
        param.grad = torch.zeros_like(param)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.add_quadratic_penalty_grad_(params, anchors, importances, 1.0)
    allocated = sum(e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0)
    assert allocated < 1_000_000


def test_empty_list():
    assert ops.quadratic_penalty([], [], [], 1.0).item() == 0.0
    assert ops.add_quadratic_penalty_grad_([], [], [], 1.0).item() == 0.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": torch.zeros(3)}, TypeError, "params must be a list or tuple"),
        ({"params": [torch.zeros(3, dtype=torch.int64)]}, TypeError, r"params\[0\] must be a float32"),
        ({"anchors": []}, ValueError, r"anchors must have as many tensors as params \(1\), got 0"),
        ({"anchors": [torch.zeros(4)]}, ValueError, r"anchors\[0\] must be of shape \[3\].*shape \[4\]"),
        (
            {"importances": [torch.zeros(3, dtype=torch.float64)]},
            TypeError,
            r"importances\[0\] must be float64 exactly",
        ),
        ({"importances": [None]}, TypeError, r"importances\[0\] must be a torch.Tensor, got NoneType"),
        ({"strength": float("nan")}, ValueError, "strength must be finite, got nan"),
        ({"strength": "1"}, TypeError, "strength must be a number, got str '1'"),
        ({"strength": 10**400}, ValueError, "strength must be finite, got 1000"),
        ({"anchors": [torch.zeros(3, device="meta")]}, ValueError, "on cpu"),
        ({"anchors": [torch.zeros(3).to_sparse()]}, TypeError, r"anchors\[0\] must be a dense tensor, got a torch.sp"),
    ],
)
def test_bad_input(change, error, message):
    param = torch.ones(3, requires_grad=True)
    good = {"params": [param], "anchors": [torch.zeros(3)], "importances": [torch.ones(3)], "strength": 1.0}
    for function in (ops.quadratic_penalty, ops.add_quadratic_penalty_grad_):
        with pytest.raises(error, match=message):
            function(**{**good, **change})
    assert param.grad is None


def sparse_grad(param):
    param.grad = torch.ones(3).to_sparse()
    return param


def narrow_grad(param):
    param = param.detach().requires_grad_()
    param.grad_dtype = torch.bfloat16
    param.grad = torch.ones(3).bfloat16()
    return param


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (sparse_grad, TypeError, r"params\[1\].grad must be a dense tensor, got a torch.sparse_coo torch.float32"),
        pytest.param(
            narrow_grad,
            TypeError,
            r"params\[1\].grad must have its parameter's dtype torch.float32, got torch.bfloat16",
            marks=pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype"),
        ),
        (lambda param: param * 2, ValueError, r"params\[1\] must be a leaf, whose .grad is kept, got one computed by"),
    ],
    ids=["sparse", "narrow", "no leaf"],
)
def test_gradients_that_cannot_be_added_to(change, error, message):
    first = torch.ones(3, requires_grad=True)
    params = [first, change(torch.ones(3, requires_grad=True))]
    with pytest.raises(error, match=message):
        ops.add_quadratic_penalty_grad_(params, [torch.zeros(3)] * 2, [torch.ones(3)] * 2, 1.0)
    assert first.grad is None


def test_bounds_are_those_of_the_table():
    assert set(RELATIVE_ERROR) == {torch.float64, torch.float32, torch.bfloat16, torch.float16}
