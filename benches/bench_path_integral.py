"""Synaptic Intelligence's path integral: against the bytes it must move, and beside the optimizer step it follows."""

import pytest
import torch

from limpet import ops, reference
from op_cases import GPT2_SHAPES, RESNET18_SHAPES

FLOOR_BYTES = 24  # per float32 parameter: read omega, previous, theta and grad, write omega and previous
SHAPES = {
    "one tensor of 50M": [(50_000_000,)],
    "ResNet-18, 62 tensors": RESNET18_SHAPES,
    "GPT-2, 148 tensors": GPT2_SHAPES,
}


def inputs(name):
    """Path integrals, the parameters before a step and after it, their gradients."""
    params = [torch.randn(shape) for shape in SHAPES[name]]
    grads = [torch.randn(shape) for shape in SHAPES[name]]
    return [torch.zeros_like(p) for p in params], [p.clone() for p in params], params, grads


@pytest.mark.parametrize("name", SHAPES)
def test_against_the_bytes_floor(name, compare, in_earnest):
    step = inputs(name)
    params = step[2]
    source = torch.randn(50_000_000)
    target = torch.empty_like(source)
    calls = {
        "ours": lambda: ops.path_integral_update_(*step),
        "reference": lambda: reference.path_integral_update_(*step, [], [], 0.0),
        "baseline": lambda: target.copy_(source),  # 8 bytes per element
    }
    if in_earnest and len(params) == 1:  # the others take minutes to compile
        compiled = torch.compile(reference.path_integral_update_)
        calls["reference compiled"] = lambda: compiled(*step, [], [], 0.0)
    scale = FLOOR_BYTES * sum(p.numel() for p in params) / (8 * source.numel())
    bound = "" if name.startswith("ResNet") else "at most 1.1"
    compare(f"path integral, {name}", "24 bytes each at copy speed", bound, calls, scale=scale)


def by_loop(step, integrals, params):
    """What most code does: keep the parameters, and multiply after the step."""
    previous = [p.detach().clone() for p in params]
    step()
    for integral, before, param in zip(integrals, previous, params, strict=True):
        integral -= param.grad * (param.detach() - before)


def by_foreach(step, integrals, params):
    previous = [p.detach().clone() for p in params]
    step()
    moved = torch._foreach_sub([p.detach() for p in params], previous)
    torch._foreach_addcmul_(integrals, [p.grad for p in params], moved, value=-1.0)


@pytest.mark.parametrize("name", SHAPES)
def test_beside_adamw(name, compare):
    integrals, previous, params, grads = inputs(name)
    for param, grad in zip(params, grads, strict=True):
        param.requires_grad_().grad = grad
    step = torch.optim.AdamW(params, fused=True).step

    def ours():
        step()
        ops.path_integral_update_(integrals, previous, params, grads)

    calls = {
        "ours": ours,
        "loop": lambda: by_loop(step, integrals, params),
        "foreach": lambda: by_foreach(step, integrals, params),
        "baseline": step,
    }
    compare(f"AdamW and path integral, {name}", "torch's AdamW(fused=True) alone", "at most 1.9", calls)
