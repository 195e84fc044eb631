"""Gated laterals on a GPU: against float64, the same bits each time, in a captured graph.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

import pytest
import torch

from limpet import ops, reference
from tolerances import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [
    ((1, 1), -1),
    ((5, 7), -1),
    ((3, 4, 35), -1),
    ((600, 70), -1),
    ((4096, 512), -1),
    ((1025, 1023), -1),
    ((2, 6, 5, 7), 1),
    ((32, 64, 16, 16), 1),
    ((0, 4), -1),
    ((2, 4, 0), 1),
]


def inputs(shape, channel_dim, dtype):
    """x, h, weight, bias that require grad, and a gradient at y."""
    channels = shape[channel_dim]
    tensors = [torch.randn(shape), torch.randn(shape), torch.randn(channels, channels) / channels**0.5]
    tensors += [torch.randn(channels), torch.randn(shape)]
    *tensors, grad = (t.to("cuda", dtype) for t in tensors)
    return [t.requires_grad_() for t in tensors], grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "channel_dim"), SHAPES)
def test_matches_float64(shape, channel_dim, dtype):
    tensors, grad = inputs(shape, channel_dim, dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y = ops.gated_lateral(*tensors, channel_dim=channel_dim)
    want = reference.gated_lateral(*wide, channel_dim=channel_dim)
    assert_close(y, want)
    grads = torch.autograd.grad(y, tensors, grad)
    for got, expected in zip(grads, torch.autograd.grad(want, wide, grad.double()), strict=True):
        assert_close(got, expected)


def test_channels_last_images_stay_so():
    tensors, _ = inputs((8, 64, 9, 9), 1, torch.float32)
    x, h = (t.detach().to(memory_format=torch.channels_last) for t in tensors[:2])
    y = ops.gated_lateral(x, h, *tensors[2:], channel_dim=1)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, reference.gated_lateral(*(t.detach().double() for t in tensors), channel_dim=1))


def test_the_same_inputs_give_the_same_bits():
    tensors, grad = inputs((4096, 512), -1, torch.bfloat16)
    first, second = (torch.autograd.grad(ops.gated_lateral(*tensors), tensors, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_captured_graph():
    tensors, grad = inputs((256, 512), -1, torch.float32)
    want = torch.autograd.grad(ops.gated_lateral(*tensors), tensors, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = torch.autograd.grad(ops.gated_lateral(*tensors), tensors, grad)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        assert_close(a, b.double())


def test_autocast():
    tensors, _ = inputs((64, 32), -1, torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = ops.gated_lateral(*tensors)
    assert y.dtype == torch.bfloat16
    assert_close(y, reference.gated_lateral(*(t.detach().double() for t in tensors)))


def test_compiles_whole():
    tensors, grad = inputs((64, 32), -1, torch.float32)
    compiled = torch.compile(ops.gated_lateral, fullgraph=True)
    want = torch.autograd.grad(ops.gated_lateral(*tensors), tensors, grad)
    got = torch.autograd.grad(compiled(*tensors), tensors, grad)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b.double())
