"""Path integral family in Triton: Synaptic Intelligence's running importance, one launch for each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from limpet import _launch
from limpet.triton_kernels._tiles import OPTIONS, cdiv

BLOCK = 1024  # elements of a program, 8 a thread


@triton.jit
def path_integral_kernel(
    integral_ptr,  # [numel], float32; added to
    previous_ptr,  # [numel], becomes theta
    theta_ptr,  # [numel]
    grad_ptr,  # [numel]
    anchor_ptr,  # [numel], read if PENALTY
    importance_ptr,  # [numel], read if PENALTY
    numel,
    strength,
    PENALTY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``integral -= (g - strength F (previous - anchor)) (theta - previous)`` where theta moved."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < numel
    theta = tl.load(theta_ptr + i, mask=inside)
    before = tl.load(previous_ptr + i, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=inside).to(tl.float32)
    integral = tl.load(integral_ptr + i, mask=inside)
    if PENALTY:
        anchor = tl.load(anchor_ptr + i, mask=inside).to(tl.float32)
        importance = tl.load(importance_ptr + i, mask=inside).to(tl.float32)
        grad -= strength * (importance * (before - anchor))
    moved = theta.to(tl.float32) - before
    tl.store(integral_ptr + i, integral - tl.where(moved == 0, 0.0, grad) * moved, mask=inside)
    tl.store(previous_ptr + i, theta, mask=inside)


def path_integral_update_(
    integrals: Sequence[Tensor],  # [*] each, float32
    previous: Sequence[Tensor],  # [*] each
    params: Sequence[Tensor],  # [*] each
    grads: Sequence[Tensor],  # [*] each
    anchors: Sequence[Tensor],  # [*] each, or none at all
    importances: Sequence[Tensor],  # [*] each, or none at all
    strength: float,
) -> None:
    """Add a step's share to ``integrals``, and bring ``previous`` to ``params``."""
    flat, copies = _launch.flat((integrals, previous, params, grads, anchors, importances), written=2)
    penalty = bool(anchors)
    lists = flat if penalty else [*flat[:4], flat[2], flat[2]]  # what is not read may be any tensor
    for tensors in zip(*lists, strict=True):
        numel = tensors[0].numel()
        if numel > 0:
            grid = (cdiv(numel, BLOCK),)
            path_integral_kernel[grid](*tensors, numel, strength, PENALTY=penalty, BLOCK=BLOCK, num_warps=4, **OPTIONS)
    for original, copy in copies:
        original.copy_(copy)
