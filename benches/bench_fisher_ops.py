"""The Fisher contraction against torch's plain weight-gradient product of the same shape."""

import pytest
import torch

from limpet import ops, reference
from limpet.ops.batch_norm_grads import batch_norm_grads
from limpet.ops.conv_input_grad import conv_input_grad
from op_cases import LINEAR_TIMED


@pytest.mark.parametrize("shape", LINEAR_TIMED, ids=str)
def test_linear(shape, compare, in_earnest):
    samples, places, rows, columns = shape
    d, a = torch.randn(samples, places, rows), torch.randn(samples, places, columns)
    total, product = torch.zeros(rows, columns), torch.empty(rows, columns)
    flat = d.reshape(-1, rows).t(), a.reshape(-1, columns)
    calls = {
        "ours": lambda: ops.sum_grad_squared_linear(d, a, into=total),
        "baseline": lambda: torch.mm(*flat, out=product),
        "reference": lambda: reference.sum_grad_squared_linear(d, a),
    }
    if in_earnest:
        compiled = torch.compile(reference.sum_grad_squared_linear)
        calls["reference compiled"] = lambda: compiled(d, a)
    bound = "at most 1.4" if places == 1 else "at most 1.15"
    compare(f"contraction {shape}", "d^T a", bound, calls)


# (samples, channels in, out, size, stride): the 3x3 convolutions of a CIFAR ResNet-18.
CONV = [(32, 64, 64, 32, 1), (32, 128, 128, 16, 1), (32, 256, 256, 8, 1), (32, 512, 512, 4, 1), (32, 64, 128, 32, 2)]


@pytest.mark.parametrize("case", [*CONV, (32, 512, 512, 7, 1)], ids=str)
def test_conv(case, compare):
    samples, channels, out_channels, size, stride = case
    x, weight = torch.randn(samples, channels, size, size), torch.randn(out_channels, channels, 3, 3)
    d = torch.randn_like(torch.conv2d(x, weight, stride=stride, padding=1))
    total = torch.zeros_like(weight)
    rest = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
    patches = torch.nn.functional.unfold(x, 3, padding=1, stride=stride).transpose(1, 2).flatten(0, 1)
    flat = d.flatten(2).transpose(0, 1).flatten(1)
    product = torch.empty(flat.shape[0], patches.shape[1])
    calls = {
        "ours": lambda: ops.sum_grad_squared_conv(d, x, 3, stride, 1, into=total),
        "baseline": lambda: torch.ops.aten.convolution_backward(d, x, weight, *rest),
        "plain product of ready patches": lambda: torch.mm(flat, patches, out=product),
    }
    compare(f"contraction, 3x3 convolution {case}", "torch's convolution weight gradient", "at most 1.15", calls)


@pytest.mark.parametrize("case", [*(case for case in CONV if case[3] > 4), (64, 512, 512, 4, 1)], ids=str)
def test_conv_input_grad(case, compare):
    samples, channels, out_channels, size, stride = case
    x, weight = torch.randn(samples, channels, size, size), torch.randn(out_channels, channels, 3, 3)
    d = torch.randn(samples, out_channels, size // stride, size // stride)
    steps, ones = [stride, stride], [1, 1]
    rest = (None, steps, ones, ones, False, [0, 0], 1, [True, False, False])
    calls = {
        "ours": lambda: conv_input_grad(d, weight, (size, size), steps, ones),
        "baseline": lambda: torch.ops.aten.convolution_backward(d, x, weight, *rest),
    }
    compare(f"input gradient, 3x3 convolution {case}", "torch's convolution input gradient", "below 1", calls)


@pytest.mark.parametrize("shape", [(64, 64, 32, 32), (64, 128, 16, 16), (64, 512, 4, 4)], ids=str)
def test_batch_norm_grads(shape, compare):
    d, x, (mean, factor) = torch.randn(shape), torch.randn(shape), torch.randn(2, shape[1])
    of_weight, of_bias = torch.zeros(2, shape[1])

    def one_pass():
        dx, *of_samples = batch_norm_grads(d, x, mean, factor)
        for total, grads in zip((of_weight, of_bias), of_samples, strict=True):
            ops.sum_grad_squared_bias(grads, into=total)
        return dx

    def three_passes():
        ops.sum_grad_squared_scale(d, x, shift=mean, channel_dim=1, into=of_weight, bias_into=of_bias)
        return d * factor.view(-1, 1, 1)

    calls = {"ours": one_pass, "baseline": three_passes}
    compare(f"batch normalisation's gradients {shape}", "its sums, and the input's gradient by torch", "below 1", calls)


# (samples, channels, channels of a group, size, stride): depthwise 3x3 convolutions of MobileNets; ResNeXt's groups.
GROUPED = [
    (32, 64, 1, 32, 1),
    (32, 128, 1, 16, 2),
    (32, 256, 1, 8, 1),
    (32, 512, 1, 4, 1),
    (32, 512, 1, 4, 2),
    (32, 128, 4, 16, 1),
]


@pytest.mark.parametrize("case", GROUPED, ids=str)
def test_conv_in_groups(case, compare):
    samples, channels, each, size, stride = case
    groups = channels // each
    x, weight = torch.randn(samples, channels, size, size), torch.randn(channels, each, 3, 3)
    d = torch.randn_like(torch.conv2d(x, weight, stride=stride, padding=1, groups=groups))
    total = torch.zeros_like(weight)
    rest = (None, [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups, [False, True, False])
    calls = {
        "ours": lambda: ops.sum_grad_squared_conv(d, x, 3, stride, 1, 1, groups, into=total),
        "baseline": lambda: torch.ops.aten.convolution_backward(d, x, weight, *rest),
    }
    what = f"contraction, 3x3 convolution in groups of {each} {case}"
    compare(what, "torch's convolution weight gradient", "at most 1.15", calls)


# Activations of a ResNet-18 at batch 64, and of a transformer's layer.
CHANNELS = [((64, 64, 32, 32), 1), ((64, 128, 16, 16), 1), ((64, 512, 4, 4), 1), ((16, 64, 256), -1)]


@pytest.mark.parametrize(("shape", "channel_dim"), CHANNELS, ids=str)
def test_channel_sums(shape, channel_dim, compare):
    d, x, shift = torch.randn(shape), torch.randn(shape), torch.randn(shape[channel_dim])
    total = torch.zeros(shape[channel_dim])
    along = shift.view(-1, *[1] * (len(shape) - 2)) if channel_dim == 1 else shift
    flat = d.flatten(), x.flatten()

    def sums(x, **options):
        return ops.sum_grad_squared_scale(d, x, channel_dim=channel_dim, into=total, **options)

    calls = {
        "ours": lambda: sums(x, shift=shift),
        "baseline": lambda: torch.dot(*flat),
        "without a shift": lambda: sums(x),
        "shift taken in a pass before": lambda: sums(x - along),
        "bias": lambda: ops.sum_grad_squared_bias(d, channel_dim=channel_dim, into=total),
    }
    compare(f"scale about a shift {shape}", "dot product: the same bytes read once", "at most 2", calls)
