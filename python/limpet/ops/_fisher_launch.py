"""The Fisher family's ops: schemas, backends, and the short way past the dispatcher for plain tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _core, _launch, reference
from limpet.ops._library import LIBRARY, define, serve_by_triton

# --- schemas, reference backend, fakes -------------------------------------------------------------------------------


def _adds_into(compute: Any) -> Any:
    """The in-place form of a reference function: the result is added to the first argument."""

    def default(total: Tensor, *args: Any) -> None:
        total += compute(*args)

    return default


def _fake(*args: Any) -> None:
    return None


for _schema, _reference in (
    ("linear_(Tensor(a!) total, Tensor output_grad, Tensor input)", reference.sum_grad_squared_linear),
    (
        "conv_(Tensor(a!) total, Tensor output_grad, Tensor input, int[] kernel_size, int[] stride, int[] padding, "
        "int[] dilation, int groups)",
        reference.sum_grad_squared_conv,
    ),
    ("bias_(Tensor(a!) total, Tensor output_grad)", reference.sum_grad_squared_bias),
):
    define(f"sum_grad_squared_{_schema} -> ()", default=_adds_into(_reference), fake=_fake)


def _embedding_default(total: Tensor, output_grad: Tensor, indices: Tensor, padding_idx: int) -> None:
    total += reference.sum_grad_squared_embedding(output_grad, indices, total.shape[0], padding_idx)


define(
    "sum_grad_squared_embedding_(Tensor(a!) total, Tensor output_grad, Tensor indices, int padding_idx) -> ()",
    default=_embedding_default,
    fake=_fake,
)


def _scale_default(
    total: Tensor, output_grad: Tensor, input: Tensor, shift: Tensor | None = None, bias_total: Tensor | None = None
) -> None:
    total += reference.sum_grad_squared_scale(output_grad, input, shift)
    if bias_total is not None:
        bias_total += reference.sum_grad_squared_bias(output_grad)


define(
    "sum_grad_squared_scale_(Tensor(a!) total, Tensor output_grad, Tensor input, Tensor? shift=None, "
    "Tensor(b!)? bias_total=None) -> ()",
    default=_scale_default,
    fake=_fake,
)


def _norm_default(
    total: Tensor, bias_total: Tensor | None, output_grad: Tensor, input: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    """The scale of the normalised activation."""
    normalised = (input.to(total.dtype) - mean.unsqueeze(2)).mul_(rstd.unsqueeze(2))
    scale(total, output_grad.to(total.dtype).unsqueeze(3), normalised.unsqueeze(3))
    if bias_total is not None:
        bias(bias_total, output_grad.unsqueeze(3))


define(
    "sum_grad_squared_norm_(Tensor(a!) total, Tensor(b!)? bias_total, Tensor output_grad, Tensor input, Tensor mean, "
    "Tensor rstd) -> ()",
    default=_norm_default,
    fake=_fake,
)

linear = torch.ops.limpet.sum_grad_squared_linear_.default
conv = torch.ops.limpet.sum_grad_squared_conv_.default
bias = torch.ops.limpet.sum_grad_squared_bias_.default
scale = torch.ops.limpet.sum_grad_squared_scale_.default
norm = torch.ops.limpet.sum_grad_squared_norm_.default
embedding = torch.ops.limpet.sum_grad_squared_embedding_.default


# --- GPU -------------------------------------------------------------------------------------------------------------

for _kind, _module in (
    ("linear", "fisher"),
    ("conv", "fisher_conv"),
    ("bias", "fisher_channel"),
    ("scale", "fisher_channel"),
    ("norm", "fisher_channel"),
    ("embedding", "fisher_embedding"),
):
    serve_by_triton(f"sum_grad_squared_{_kind}_", f"limpet.triton_kernels.{_module}")


# --- CPU -------------------------------------------------------------------------------------------------------------


def _linear_cpu(total: Tensor, output_grad: Tensor, input: Tensor) -> None:
    samples, places, rows = output_grad.shape
    sizes = (samples, places, rows, input.shape[2])
    dtype, threads = _launch.DTYPE_CODES[output_grad.dtype], _launch.threads()
    workspace = _launch.workspace(_core.linear_workspace(sizes, dtype, threads), total.device)
    _core.sum_grad_squared_linear(
        total.data_ptr(),
        output_grad.data_ptr(),
        input.data_ptr(),
        sizes,
        output_grad.stride(),
        input.stride(),
        dtype,
        workspace.data_ptr(),
        threads,
    )


def _three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Sizes of 1, 2 or 3 spatial dimensions as those of three."""
    return (fill,) * (3 - len(values)) + tuple(values)


def _batch_and_three(strides: Sequence[int]) -> tuple[int, ...]:
    """Strides of samples, channels and 1, 2 or 3 spatial dimensions as those of three."""
    return (*strides[:2], *_three(strides[2:], 0))


def _conv_cpu(
    total: Tensor,
    output_grad: Tensor,
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    if output_grad.numel() == 0 or total.numel() == 0:
        return
    samples, out_channels, *output_size = output_grad.shape
    _, in_channels, *input_size = input.shape
    geometry = (
        (samples, out_channels, in_channels, groups),
        _three(output_size, 1),
        _three(input_size, 1),
        _three(kernel_size, 1),
        _three(stride, 1),
        _three(padding, 0),
        _three(dilation, 1),
    )
    dtype, threads = _launch.DTYPE_CODES[output_grad.dtype], _launch.threads()
    workspace = _launch.workspace(_core.conv_workspace(*geometry, dtype, threads), total.device)
    _core.sum_grad_squared_conv(
        total.data_ptr(),
        output_grad.data_ptr(),
        input.data_ptr(),
        *geometry,
        _batch_and_three(output_grad.stride()),
        _batch_and_three(input.stride()),
        dtype,
        workspace.data_ptr(),
        threads,
    )


def _scale_cpu(
    total: Tensor,
    output_grad: Tensor,
    input: Tensor | None = None,
    shift: Tensor | None = None,
    bias_total: Tensor | None = None,
) -> None:
    if bias_total is not None:
        _scale_cpu(bias_total, output_grad)
    _core.sum_grad_squared_channel(
        total.data_ptr(),
        output_grad.data_ptr(),
        0 if input is None else input.data_ptr(),
        0 if shift is None else shift.data_ptr(),
        output_grad.shape,
        output_grad.stride(),
        (0, 0, 0, 0) if input is None else input.stride(),
        _launch.DTYPE_CODES[output_grad.dtype],
        _launch.threads(),
    )


def _embedding_cpu(total: Tensor, output_grad: Tensor, indices: Tensor, padding_idx: int) -> None:
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < total.shape[0]:
        raise ValueError(
            f"indices must be at least 0 and below {total.shape[0]}, got {int(indices.min())} to {int(indices.max())}"
        )
    indices = indices.contiguous()
    _core.sum_grad_squared_embedding(
        total.data_ptr(),
        output_grad.data_ptr(),
        indices.data_ptr(),
        (*output_grad.shape[:2], *total.shape),
        padding_idx,
        output_grad.stride(),
        _launch.DTYPE_CODES[output_grad.dtype],
        _launch.threads(),
    )


for _name, _kernel in (
    ("linear", _linear_cpu),
    ("conv", _conv_cpu),
    ("bias", _scale_cpu),
    ("scale", _scale_cpu),
    ("embedding", _embedding_cpu),
):
    LIBRARY.impl(f"sum_grad_squared_{_name}_", _kernel, "CPU")


# --- plain tensors on the CPU ----------------------------------------------------------------------------------------


def _plain_sums() -> _core.PlainSums | None:
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)  # torch has it since 2.10
    return None if exchange is None else _core.PlainSums(exchange, Tensor)


_PLAIN = _plain_sums()


def _cannot(*_: Any) -> bool:
    return False


add_plain_linear: Callable[..., bool] = _cannot if _PLAIN is None else _PLAIN.linear  # as PlainSums.linear


def surely_finite(tensor: Tensor) -> bool:
    """Whether this is a plain tensor on the CPU whose elements are all finite; False is no answer."""
    return _PLAIN is not None and _PLAIN.finite(tensor)


def surely_same(a: Tensor, b: Tensor) -> bool:
    """Whether these are plain tensors on the CPU that hold the same bytes; False is no answer."""
    return _PLAIN is not None and _PLAIN.same(a, b)


def added(name: str, totals: Sequence[Tensor | None], *args: Any) -> bool:
    """Whether one call of the core added to the totals, past checks and dispatcher: where all is plain and fits."""
    if _PLAIN is None or totals[0] is None or torch.compiler.is_compiling():
        return False
    added: bool = getattr(_PLAIN, name)(*totals, *args, _launch.threads())
    return added
