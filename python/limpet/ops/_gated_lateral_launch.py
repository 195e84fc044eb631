"""Gated lateral family: schemas, and what the core is given on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _core, _launch, reference
from limpet._channels import add_input_grad_, aligned, map_channels, matrix, weight_grad
from limpet.ops._library import LIBRARY, define, serve_by_triton

# --- schemas, reference backend, fakes -------------------------------------------------------------------------------

# The product h W^T is kept for backward, which computes the gate from it again: the gate itself, rounded to 16 bits,
# would have lost what 1 - g is where the gate is open. What is not wanted comes back as an empty tensor.


def _forward_default(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int, keep_product: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(aligned(x, h, channel_dim)[0])
    y.copy_(reference.gated_lateral(x, h, weight, bias, channel_dim))
    if not keep_product:
        return y, x.new_empty(0)
    return y, torch.empty_like(y).copy_(reference.gate_product(h, weight, channel_dim))


def _forward_fake(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int, keep_product: bool
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(aligned(x, h, channel_dim)[0])
    return y, torch.empty_like(y) if keep_product else x.new_empty(0)


def _backward_default(*arguments: Any) -> list[Tensor]:
    *inputs, wanted = arguments
    grads = reference.gated_lateral_backward(*inputs)
    likes = _backward_fake(*arguments)
    return [like.copy_(grad) if want else like for like, grad, want in zip(likes, grads, wanted, strict=True)]


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor,
    channel_dim: int,
    wanted: Sequence[bool],
) -> list[Tensor]:
    likes = product, product, weight.contiguous(), weight.new_empty(weight.shape[:1])
    return [torch.empty_like(like) if want else x.new_empty(0) for like, want in zip(likes, wanted, strict=True)]


define(
    "gated_lateral(Tensor x, Tensor h, Tensor weight, Tensor? bias, int channel_dim, bool keep_product) "
    "-> (Tensor, Tensor)",
    default=_forward_default,
    fake=_forward_fake,
)
define(
    "gated_lateral_backward(Tensor grad, Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor product, "
    "int channel_dim, bool[] wanted) -> Tensor[]",
    default=_backward_default,
    fake=_backward_fake,
)

forward = torch.ops.limpet.gated_lateral.default
backward = torch.ops.limpet.gated_lateral_backward.default


# --- CPU -------------------------------------------------------------------------------------------------------------


def _sizes(matrix: Tensor) -> tuple[int, int, int]:  # [rows, H] or [N, H, P]
    """Samples, channels and places as the core counts them."""
    shape = matrix.shape
    return (shape[0], shape[1], 1) if len(shape) == 2 else (shape[0], shape[1], shape[2])


def forward_cpu(
    x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int, keep_product: bool
) -> tuple[Tensor, Tensor | None]:
    x, h, last = aligned(x, h, channel_dim)
    y = torch.empty_like(x)
    product = torch.empty_like(x) if keep_product else y  # the pass may write y where it reads the product
    inputs = matrix(h, channel_dim, last)
    map_channels(inputs, weight, matrix(product, channel_dim, last))
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _core.gated_lateral(
        y.data_ptr(),
        x.data_ptr(),
        h.data_ptr(),
        product.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        _sizes(inputs),
        _launch.DTYPE_CODES[x.dtype],
        _launch.threads(),
    )
    return y, product if keep_product else None


def backward_cpu(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product: Tensor,
    channel_dim: int,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    x, h, last = aligned(x, h, channel_dim)
    grad, _, _ = aligned(grad, h, channel_dim)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    want_x, want_h, want_weight, want_bias = wanted
    inputs = matrix(h, channel_dim, last)
    sizes = _sizes(inputs)
    x_grad = torch.empty_like(x) if want_x else None
    h_grad = torch.empty_like(x) if want_h else None
    bias_grad = torch.empty_like(bias) if want_bias and bias is not None else None
    logit_grad = torch.empty_like(x) if want_h or want_weight else None
    workspace = _launch.workspace(_core.gated_lateral_workspace(sizes), x.device) if bias_grad is not None else None
    _core.gated_lateral_backward(
        grad.data_ptr(),
        x.data_ptr(),
        h.data_ptr(),
        product.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        sizes,
        _launch.DTYPE_CODES[x.dtype],
        0 if x_grad is None else x_grad.data_ptr(),
        0 if h_grad is None else h_grad.data_ptr(),
        0 if logit_grad is None else logit_grad.data_ptr(),
        0 if bias_grad is None else bias_grad.data_ptr(),
        0 if workspace is None else workspace.data_ptr(),
        _launch.threads(),
    )
    products = None
    if logit_grad is not None:
        outputs = matrix(logit_grad, channel_dim, last)
        if h_grad is not None:
            add_input_grad_(matrix(h_grad, channel_dim, last), outputs, weight)
        if want_weight:
            products = weight_grad(outputs, inputs)
    return [x_grad, h_grad, products, bias_grad]


def _forward_op_cpu(*arguments: Any) -> tuple[Tensor, Tensor]:
    y, product = forward_cpu(*arguments)
    return y, y.new_empty(0) if product is None else product


def _backward_op_cpu(grad: Tensor, *arguments: Any) -> list[Tensor]:
    return [grad.new_empty(0) if g is None else g for g in backward_cpu(grad, *arguments)]


LIBRARY.impl("gated_lateral", torch.no_grad()(_forward_op_cpu), "CPU")
LIBRARY.impl("gated_lateral_backward", torch.no_grad()(_backward_op_cpu), "CPU")
serve_by_triton("gated_lateral", "limpet.triton_kernels.gated_lateral")
serve_by_triton("gated_lateral_backward", "limpet.triton_kernels.gated_lateral")
