"""Narrow storage on a GPU: kernels against float64 of the values that are held, and packing as on the CPU.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

import pytest
import torch

from limpet import ops, reference
from op_cases import quadratic_inputs
from tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SHAPES = [(0,), (1,), (7, 3), (1025,), (8192,), (8193,), (3, 5, 1001), (200_003,)]
ANCHORS = {
    "float32": lambda a: a,
    "fixed16": ops.pack_anchor,
    "split24": lambda a: ops.pack_anchor(a, "split24"),
}
IMPORTANCES = {"float32": lambda f: f, "log8": ops.pack_importance}


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("anchor", ANCHORS)
@pytest.mark.parametrize("theta", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_quadratic(theta, anchor, importance):
    params, anchors, importances = quadratic_inputs(SHAPES, theta, torch.float32, torch.float32)
    wide = [p.detach().double() for p in params]
    stored = [ANCHORS[anchor](a) for a in anchors], [IMPORTANCES[importance](f) for f in importances]
    dense = [
        [reference.dense_anchor(a, p).double() for a, p in zip(stored[0], params, strict=True)],
        [reference.dense_importance(f, p).double() for f, p in zip(stored[1], params, strict=True)],
    ]
    value = reference.quadratic_penalty(wide, *dense, 3.0)
    grads = reference.quadratic_penalty_grad(wide, *dense, 3.0, torch.tensor(1.0))

    params = [p.detach().cuda().requires_grad_() for p in params]
    lists = params, *([t.cuda() for t in tensors] for tensors in stored)
    got = ops.quadratic_penalty(*lists, 3.0)
    got.backward()
    assert_close(got, value)
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, grad)
        param.grad = torch.ones_like(param)
    assert torch.equal(ops.add_quadratic_penalty_grad_(*lists, 3.0), got)
    for param, grad in zip(params, grads, strict=True):
        assert_close(param.grad, 1.0 + grad)


def test_packing_gives_the_bits_of_the_cpu():
    values = torch.randn(5000)
    for pack in (ops.pack_anchor, lambda a: ops.pack_anchor(a, "split24"), lambda f: ops.pack_importance(f.abs())):
        assert torch.equal(pack(values.cuda()).cpu(), pack(values))


def test_packed_tensors_at_odd_addresses():
    values = torch.rand(5000, device="cuda")
    params = [values.clone().requires_grad_()]
    packed = ops.pack_anchor(values.neg(), "split24"), ops.pack_importance(values)
    want = ops.quadratic_penalty(params, [packed[0]], [packed[1]], 2.0)
    shifted = [torch.cat([p[:shift], p])[shift:] for p, shift in zip(packed, (1, 2), strict=True)]
    assert_close(ops.quadratic_penalty(params, [shifted[0]], [shifted[1]], 2.0), want.double())
