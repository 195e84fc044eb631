"""The quadratic penalty on narrow importances and anchors, against float64 of the values that they hold."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import ops, reference
from op_cases import quadratic_inputs
from tolerances import assert_close

SHAPES = [(), (1,), (0,), (3, 5), (1023,), (1024,), (1025,), (16385,), (40000,), (64, 3, 3, 3)]
THETA = (torch.float32, torch.bfloat16, torch.float16)
ANCHORS = {
    "float32": lambda a: a,
    "bfloat16": lambda a: a.bfloat16(),
    "float16": lambda a: a.half(),
    "fixed16": ops.pack_anchor,
    "split24": lambda a: ops.pack_anchor(a, "split24"),
}
IMPORTANCES = {
    "float32": lambda f: f,
    "bfloat16": lambda f: f.bfloat16(),
    "float16": lambda f: f.half(),
    "log8": ops.pack_importance,
}
FORMATS = [(a, f) for a in ANCHORS for f in IMPORTANCES if a in ("fixed16", "split24") or f == "log8"]


def narrow_inputs(shapes, theta, anchor, importance):
    params, anchors, importances = quadratic_inputs(shapes, theta, torch.float32, torch.float32)
    if theta != torch.float16:  # whose gradients would underflow
        importances = [f**8 for f in importances]  # over several decades
    return params, [ANCHORS[anchor](a) for a in anchors], [IMPORTANCES[importance](f) for f in importances]


def expected(params, anchors, importances, strength):
    """Value and gradients in float64, of the values that the formats hold."""
    wide = (
        [p.detach().double() for p in params],
        [reference.dense_anchor(a, p.detach()).double() for a, p in zip(anchors, params, strict=True)],
        [reference.dense_importance(f, p.detach()).double() for f, p in zip(importances, params, strict=True)],
    )
    value = reference.quadratic_penalty(*wide, strength)
    return value, reference.quadratic_penalty_grad(*wide, strength, torch.tensor(1.0))


@pytest.mark.parametrize(("anchor", "importance"), FORMATS)
@pytest.mark.parametrize("theta", THETA, ids=str)
def test_value_and_gradient_match_float64(theta, anchor, importance):
    tensors = narrow_inputs(SHAPES, theta, anchor, importance)
    params = tensors[0]
    value, grads = expected(*tensors, 3.0)

    got = ops.quadratic_penalty(*tensors, 3.0)
    got.backward()
    assert_close(got, value)
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, grad)

    for param in params:
        param.grad = torch.ones_like(param)
    assert ops.add_quadratic_penalty_grad_(*tensors, 3.0).item() == got.item()
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, 1.0 + grad)


@given(
    formats=st.sampled_from(FORMATS),
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=4),
)
@settings(max_examples=40)
def test_any_list_of_shapes(formats, shapes):
    tensors = narrow_inputs(shapes, torch.float32, *formats)
    value, grads = expected(*tensors, 2.0)
    assert_close(ops.add_quadratic_penalty_grad_(*tensors, 2.0), value)
    for param, grad in zip(tensors[0], grads, strict=True):
        assert_close(param.grad, grad)


def test_formats_mix_in_one_list():
    one = [narrow_inputs([(70, 30)], torch.float32, a, f) for a, f in itertools.product(ANCHORS, IMPORTANCES)]
    tensors = [[lists[k][0] for lists in one] for k in range(3)]
    value, grads = expected(*tensors, 2.0)
    assert_close(ops.add_quadratic_penalty_grad_(*tensors, 2.0), value)
    for param, grad in zip(tensors[0], grads, strict=True):
        assert_close(param.grad, grad)


def test_parameters_that_are_not_contiguous():
    image = torch.randn(6, 30, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    turned = torch.randn(50, 60).t().requires_grad_()
    params = [image, turned]
    anchors = [ops.pack_anchor(torch.randn(p.shape)) for p in params]
    importances = [ops.pack_importance(torch.rand(p.shape)) for p in params]
    value, grads = expected(params, anchors, importances, 2.0)
    for param in params:
        param.grad = torch.zeros_like(param)
    assert_close(ops.add_quadratic_penalty_grad_(params, anchors, importances, 2.0), value)
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, grad)


def test_packed_tensors_that_are_strided_or_at_odd_addresses():
    params, anchors, importances = narrow_inputs([(2500,)], torch.float32, "split24", "log8")
    value, _ = expected(params, anchors, importances, 2.0)
    for shift in (
        lambda packed: torch.cat([packed[:1], packed])[1:],
        lambda packed: torch.stack([packed, packed], dim=1)[:, 0],
    ):
        lists = params, [shift(a) for a in anchors], [shift(f) for f in importances]
        assert_close(ops.quadratic_penalty(*lists, 2.0), value)


def test_no_gradient_where_the_parameter_is_its_anchor():
    """The decoded anchor is exact in float32, so the difference is exactly zero."""
    for format in ("fixed16", "split24"):
        anchor = ops.pack_anchor(torch.randn(5000), format)
        param = ops.unpack_anchor(anchor, [5000]).requires_grad_()
        value = ops.add_quadratic_penalty_grad_([param], [anchor], [ops.pack_importance(torch.rand(5000))], 1e6)
        assert value.item() == 0
        assert not param.grad.any()


def test_threads_do_not_change_a_bit():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        tensors = narrow_inputs([(100_003,), (5,), (77_777,)], torch.float32, "fixed16", "log8")
        value = ops.add_quadratic_penalty_grad_(*tensors, 5.0)
        results.append([value, *(p.grad for p in tensors[0])])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_second_derivative_compiler_and_vmap():
    params, anchors, importances = narrow_inputs([(30, 40)], torch.float32, "fixed16", "log8")
    importance = ops.unpack_importance(importances[0], [30, 40])

    def value(theta):
        return ops.quadratic_penalty([theta], anchors, importances, 3.0)

    (grad,) = torch.autograd.grad(value(params[0]), params, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), params)
    assert_close(second, 3.0 * importance.double())
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    assert_close(torch.autograd.grad(compiled(params[0]), params)[0], grad.double())
    several = torch.stack([params[0].detach(), anchors[0].new_zeros(30, 40).float()])
    assert_close(torch.vmap(value)(several), torch.stack([value(t) for t in several]).double())


@pytest.mark.parametrize(("anchor", "importance"), [("fixed16", "log8"), ("split24", "float32")])
def test_opcheck(anchor, importance):
    tensors = [[t.detach() for t in ts] for ts in narrow_inputs([(3, 2), (70,)], torch.float32, anchor, importance)]
    grads = [torch.zeros_like(p) for p in tensors[0]]
    torch.library.opcheck(torch.ops.limpet.quadratic_penalty.default, (*tensors, 3.0))
    torch.library.opcheck(torch.ops.limpet.quadratic_penalty_grad.default, (*tensors, 3.0, torch.tensor(2.0)))
    torch.library.opcheck(torch.ops.limpet.add_quadratic_penalty_grad_.default, (tensors[0], grads, *tensors[1:], 3.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"importances": [torch.zeros(3, dtype=torch.uint8)]},
            ValueError,
            r"importances\[0\] must be of shape \[18\] on cpu to be params\[0\] packed as log8, got a torch.uint8 ten",
        ),
        (
            {"anchors": [ops.pack_anchor(torch.ones(20))]},
            ValueError,
            r"anchors\[0\] must be of shape \[9\].*as fixed16",
        ),
        ({"importances": [ops.pack_anchor(torch.ones(3))]}, TypeError, r"importances\[0\] must be a float32"),
        ({"params": [torch.ones(3, dtype=torch.float64)]}, TypeError, r"anchors\[0\] must be float64 exactly where"),
    ],
)
def test_bad_input(change, error, message):
    param = torch.ones(3, requires_grad=True)
    good = {
        "params": [param],
        "anchors": [ops.pack_anchor(torch.zeros(3))],
        "importances": [ops.pack_importance(torch.ones(3))],
        "strength": 1.0,
    }
    for function in (ops.quadratic_penalty, ops.add_quadratic_penalty_grad_):
        with pytest.raises(error, match=message):
            function(**{**good, **change})
    assert param.grad is None
