"""Gated laterals, forward and backward, against the bare matrix products that they need: one, and two."""

import pytest
import torch

from limpet import ops

TARGETS = {256: "at most 1.25", 1024: "at most 1.08", 2048: "at most 1.05"}
BATCH = 256


def inputs(*shape, channels):
    x, h = (torch.randn(shape).requires_grad_() for _ in range(2))
    weight = (torch.randn(channels, channels) / channels**0.5).requires_grad_()
    return x, h, weight, torch.randn(channels).requires_grad_()


def eager(x, h, weight, bias):
    gate = torch.sigmoid(torch.nn.functional.linear(h, weight, bias))
    return x * gate + h * (1 - gate)


def lerp(x, h, weight, bias):
    return torch.lerp(h, x, torch.sigmoid(torch.nn.functional.linear(h, weight, bias)))


def eager_channels(x, h, weight, bias):
    gate = torch.sigmoid(torch.nn.functional.conv2d(h, weight[:, :, None, None], bias))
    return x * gate + h * (1 - gate)


def both_ways(function, tensors, grad, wanted):
    return lambda: torch.autograd.grad(function(*tensors), wanted, grad)


def peers(functions, tensors, grad, wanted, in_earnest):
    calls = {name: both_ways(f, tensors, grad, wanted) for name, f in functions.items()}
    if in_earnest:
        calls["torch.compile"] = both_ways(torch.compile(functions["eager"], dynamic=False), tensors, grad, wanted)
    return calls


@pytest.mark.parametrize("width", TARGETS)
def test_against_the_products(width, compare, in_earnest):
    tensors = inputs(BATCH, width, channels=width)
    grad = torch.randn(BATCH, width)
    h, weight = (t.detach() for t in tensors[1:3])

    def products():
        return h @ weight.T, grad @ weight, grad.T @ h

    functions = {"ours": ops.gated_lateral, "eager": eager, "eager, lerp": lerp}
    calls = {"baseline": products, **peers(functions, tensors, grad, tensors, in_earnest)}
    what = f"gated lateral, forward and backward, {BATCH} x {width}"
    compare(what, "its three matrix products", TARGETS[width], calls)


def test_frozen_earlier_column(compare, in_earnest):
    """As in a progressive network: nothing below ``h`` learns, and one of the three products falls away."""
    tensors = inputs(BATCH, 1024, channels=1024)
    tensors[1].requires_grad_(False)
    wanted = tensors[0], *tensors[2:]
    grad = torch.randn(BATCH, 1024)
    h, weight = tensors[1], tensors[2].detach()

    def products():
        return h @ weight.T, grad.T @ h

    functions = {"ours": ops.gated_lateral, "eager": eager, "eager, lerp": lerp}
    calls = {"baseline": products, **peers(functions, tensors, grad, wanted, in_earnest)}
    what = f"gated lateral from a frozen column, forward and backward, {BATCH} x 1024"
    compare(what, "its two matrix products", "", calls)


@pytest.mark.parametrize(("samples", "channels", "side"), [(32, 64, 32), (64, 128, 16), (64, 512, 7)])
def test_channels_against_eager(samples, channels, side, compare, in_earnest):
    tensors = inputs(samples, channels, side, side, channels=channels)
    grad = torch.randn(samples, channels, side, side)

    def ours(*tensors):
        return ops.gated_lateral(*tensors, channel_dim=1)

    functions = {"ours": ours, "eager": eager_channels}
    calls = peers(functions, tensors, grad, tensors, in_earnest)
    calls["baseline"] = calls.pop("eager")
    what = f"gated lateral of channels, forward and backward, {samples} x {channels} x {side} x {side}"
    compare(what, "eager, 1x1 convolution", "", calls)


@pytest.mark.parametrize("combine", ["chain", "sum"])
def test_four_laterals(combine, compare):
    """What one fused pass over all laterals could save at most: all but their products."""
    columns, width = 4, 512
    x, *_ = inputs(BATCH, width, channels=width)
    laterals = [inputs(BATCH, width, channels=width)[1:] for _ in range(columns)]
    hs, weights, biases = (list(group) for group in zip(*laterals, strict=True))
    grad, wanted = torch.randn(BATCH, width), [x, *hs, *weights, *biases]
    plain = [(h.detach(), weight.detach()) for h, weight, _ in laterals]

    def ours():
        return torch.autograd.grad(ops.gated_laterals(x, hs, weights, biases, combine=combine), wanted, grad)

    def products():
        return [(h @ weight.T, grad @ weight, grad.T @ h) for h, weight in plain]

    what = f"four gated laterals, {combine}, forward and backward, {BATCH} x {width}"
    compare(what, "their twelve matrix products", "", {"ours": ours, "baseline": products})
