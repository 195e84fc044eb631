"""limpet's ops: fused kernels as plain functions of tensors, on the CPU, on CUDA and wherever Triton runs."""

from limpet.ops.fisher import (
    sum_grad_squared_bias,
    sum_grad_squared_conv,
    sum_grad_squared_embedding,
    sum_grad_squared_linear,
    sum_grad_squared_norm,
    sum_grad_squared_scale,
)
from limpet.ops.gated_lateral import gated_lateral, gated_laterals
from limpet.ops.keyed import keyed_insert_
from limpet.ops.narrow import pack_anchor, pack_importance, unpack_anchor, unpack_importance
from limpet.ops.optim import adamw_step_, sgd_step_
from limpet.ops.path_integral import path_integral_update_
from limpet.ops.quadratic import add_quadratic_penalty_grad_, quadratic_penalty
from limpet.ops.reservoir import gather_rows, reservoir_insert_, reservoir_slots, sample_without_replacement

__all__ = [
    "adamw_step_",
    "add_quadratic_penalty_grad_",
    "gated_lateral",
    "gated_laterals",
    "gather_rows",
    "keyed_insert_",
    "pack_anchor",
    "pack_importance",
    "path_integral_update_",
    "quadratic_penalty",
    "reservoir_insert_",
    "reservoir_slots",
    "sample_without_replacement",
    "sgd_step_",
    "sum_grad_squared_bias",
    "sum_grad_squared_conv",
    "sum_grad_squared_embedding",
    "sum_grad_squared_linear",
    "sum_grad_squared_norm",
    "sum_grad_squared_scale",
    "unpack_anchor",
    "unpack_importance",
]
