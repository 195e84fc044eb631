"""A step of AdamW, with EWC and Synaptic Intelligence in its pass, against torch's fused step and the bytes moved."""

import functools

import pytest
import torch

from compare import interleave
from limpet import optim
from op_cases import RESNET18_SHAPES

BLOCK = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,), (768,), (768,)]
BLOCK += [(768, 3072), (3072,), (3072, 768), (768,)]
SHAPES = {
    "ResNet-18, 62 tensors": RESNET18_SHAPES,
    "one tensor of 50M": [(50_000_000,)],
    "GPT-2, 148 tensors": [(50257, 768), (1024, 768), *12 * BLOCK, (768,), (768,)],
}
EWC_AND_SI_BYTES = 44  # parameter, two moments and the integral read and written; gradient, anchor and importance read


class Regularizer:
    """A quadratic penalty, and path integrals."""

    def __init__(self, model, penalty):
        named = {name: p.detach() for name, p in model.named_parameters()}
        self.model = model
        self.anchors = {n: p + 0.01 for n, p in named.items()} if penalty else {}
        self.importances = {n: torch.rand_like(p) for n, p in named.items()} if penalty else {}
        self.integrals = {n: torch.zeros_like(p) for n, p in named.items()}

    def quadratic(self):
        return self.anchors, self.importances, 1.0


def model_of(shapes):
    model = torch.nn.Module()
    for k, shape in enumerate(shapes):
        param = torch.nn.Parameter(torch.randn(shape).mul_(0.02))
        param.grad = torch.randn(shape).mul_(1e-3)
        model.register_parameter(f"p{k}", param)
    return model


def usual_loops(params, regularizer, optimizer):
    """The penalty through autograd and the path integral by copies, parameter by parameter."""
    of = [getattr(regularizer, name).values() for name in ("anchors", "importances", "integrals")]
    tensors = list(zip(params, *of, strict=True))
    task_grads = [p.grad.clone() for p in params]
    penalty = sum((importance * (p - anchor).pow(2)).sum() for p, anchor, importance, _ in tensors)
    (0.5 * penalty).backward()
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for (p, _, _, omega), grad, old in zip(tensors, task_grads, before, strict=True):
        omega -= grad * (p.detach() - old)
        p.grad.copy_(grad)


@functools.cache  # one measurement gives every row of a shape
def measured(name, in_earnest):
    """Seconds of each candidate, and how many parameters there are."""
    model = model_of(SHAPES[name])
    params = list(model.parameters())
    both = Regularizer(model, penalty=True)
    source = torch.randn(50_000_000)
    target = torch.empty_like(source)
    torchs = torch.optim.AdamW(params, fused=True)
    with_both = optim.AdamW(params, regularizers=[both]).step
    calls = {
        "ours": optim.AdamW(params).step,
        "with SI": optim.AdamW(params, regularizers=[Regularizer(model, penalty=False)]).step,
        "with EWC and SI": with_both,
        "torch, fused": torchs.step,
        "copy": lambda: target.copy_(source),  # 8 bytes per element
    }
    # What takes seconds and gives its memory back is timed apart: the others get more rounds, and none comes after it.
    slow = {
        "with EWC and SI, once more": with_both,
        "torch, fused, and loops": lambda: usual_loops(params, both, torchs),
    }
    if in_earnest:
        slow["torch, foreach"] = torch.optim.AdamW(params, foreach=True).step
    seconds = interleave(calls, once=not in_earnest) | interleave(slow, once=not in_earnest)
    return seconds, sum(p.numel() for p in params)


ROWS = {  # ours: the baseline, what it is, the bound, peers
    "ours": ("torch, fused", "torch's fused step", "at most 1.0", []),
    "with SI": ("torch, fused", "torch's fused step", "at most 1.4", []),
    "with EWC and SI": ("copy", "44 bytes each at copy speed", "at most 1.15", []),
    "with EWC and SI, once more": (
        "torch, fused, and loops",
        "torch's fused step and loops",
        "at most 0.167",
        ["torch, foreach"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("row", ROWS)
def test_adamw(row, name, compare, in_earnest):
    seconds, count = measured(name, in_earnest)
    baseline, against, bound, peers = ROWS[row]
    seconds = {key: seconds[key] for key in (row, baseline, *peers) if key in seconds}
    scale = EWC_AND_SI_BYTES * count / (8 * 50_000_000) if baseline == "copy" else 1.0
    what = f"AdamW{'' if row == 'ours' else ' ' + row.removesuffix(', once more')}, {name}"
    compare(what, against, bound, seconds=seconds, ours=row, baseline=baseline, scale=scale)
