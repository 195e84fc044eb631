"""The specification: every op in plain torch, with the signature it has in :mod:`limpet.ops`.

Tests compare the kernels with these functions in float64, the benches time them beside the kernels, and devices for
which there is no kernel run them. They are written to be read, not to be fast. ``N`` counts samples, ``T`` the places
where a sample uses a weight (tokens, pixels), ``O`` and ``I`` are a weight's rows and columns.
"""

from limpet.reference.dtypes import (
    wide,
)
from limpet.reference.fisher import (
    sum_grad_squared_bias,
    sum_grad_squared_conv,
    sum_grad_squared_embedding,
    sum_grad_squared_linear,
    sum_grad_squared_norm,
    sum_grad_squared_scale,
)
from limpet.reference.gated_lateral import (
    gate_product,
    gated_lateral,
    gated_lateral_backward,
    gated_laterals,
)
from limpet.reference.keyed import (
    keyed_insert_,
    keyed_order,
)
from limpet.reference.narrow import (
    NARROW_BLOCK,
    dense_anchor,
    dense_importance,
    pack_fixed16,
    pack_log8,
    pack_split24,
    unpack_fixed16,
    unpack_log8,
    unpack_split24,
)
from limpet.reference.optim import (
    adamw_step_,
    sgd_step_,
)
from limpet.reference.path_integral import (
    path_integral_update_,
)
from limpet.reference.quadratic import (
    add_quadratic_penalty_grad_,
    quadratic_penalty,
    quadratic_penalty_grad,
)
from limpet.reference.random import (
    philox,
)
from limpet.reference.reservoir import (
    gather_rows_,
    reservoir_insert_,
    reservoir_slots_,
    sample_without_replacement_,
)

__all__ = [
    "NARROW_BLOCK",
    "adamw_step_",
    "add_quadratic_penalty_grad_",
    "dense_anchor",
    "dense_importance",
    "gate_product",
    "gated_lateral",
    "gated_lateral_backward",
    "gated_laterals",
    "gather_rows_",
    "keyed_insert_",
    "keyed_order",
    "pack_fixed16",
    "pack_log8",
    "pack_split24",
    "path_integral_update_",
    "philox",
    "quadratic_penalty",
    "quadratic_penalty_grad",
    "reservoir_insert_",
    "reservoir_slots_",
    "sample_without_replacement_",
    "sgd_step_",
    "sum_grad_squared_bias",
    "sum_grad_squared_conv",
    "sum_grad_squared_embedding",
    "sum_grad_squared_linear",
    "sum_grad_squared_norm",
    "sum_grad_squared_scale",
    "unpack_fixed16",
    "unpack_log8",
    "unpack_split24",
    "wide",
]
