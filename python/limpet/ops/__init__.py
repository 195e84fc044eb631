"""limpet's ops: fused kernels as plain functions of tensors, on the CPU, on CUDA and wherever Triton runs."""

from limpet.ops.fisher import (
    sum_grad_squared_bias,
    sum_grad_squared_conv,
    sum_grad_squared_embedding,
    sum_grad_squared_linear,
    sum_grad_squared_scale,
)

__all__ = [
    "sum_grad_squared_bias",
    "sum_grad_squared_conv",
    "sum_grad_squared_embedding",
    "sum_grad_squared_linear",
    "sum_grad_squared_scale",
]
