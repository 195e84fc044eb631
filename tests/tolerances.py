"""The one table of tolerances: relative error against a float64 reference, by the dtype of the inputs.

The bound is on ``max|got - want| / max|want|``. A float32 kernel that sums K products in a fixed tree errs by a few
units in the last place times sqrt(K); bfloat16 and float16 inputs are exact once read (the reference reads the same
rounded values), so they meet the float32 bound wherever the *result* is float32, and their own where it is theirs.
"""

import torch

RELATIVE_ERROR = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """``max|got - want| / max|want|`` in float64; 0 where both are empty; inf where shapes differ or a value is NaN."""
    if got.shape != want.shape:
        return float("inf")
    if want.numel() == 0:
        return 0.0
    difference = (got.detach().double().cpu() - want.detach().double().cpu()).abs().max().item()
    scale = want.detach().double().abs().max().item()
    if difference != difference:
        return float("inf")
    return difference if scale == 0 else difference / scale


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert the table's bound for ``dtype`` (the result's own, when not given)."""
    bound = RELATIVE_ERROR[dtype or got.dtype]
    error = relative_error(got, want)
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.0e} for {dtype or got.dtype}"
