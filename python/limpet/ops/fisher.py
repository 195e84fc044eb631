"""Fisher family: sums over samples of squared per-sample gradients that are never materialised.

Each function takes ``into``, a tensor of the result's shape to which the sum is *added* in place; a running sum over
batches then costs no second buffer. Without it the result is a new tensor, float32 (float64 for float64 inputs).
It must not share memory with an input. No gradient flows through these sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, reference
from limpet.ops import _fisher_launch as launch

# --- validation ------------------------------------------------------------------------------------------------------


def _pair(output_grad: Any, input: Any) -> tuple[Tensor, Tensor]:
    d, x = _checks.float_tensor("output_grad", output_grad), _checks.float_tensor("input", input)
    if d.dtype != x.dtype:
        raise TypeError(f"input must have output_grad's dtype {d.dtype}, got {x.dtype}")
    _checks.same_device("input", x, "output_grad", d)
    return d, x


def _total(into: Tensor | None, shape: Sequence[int], like: Tensor, name: str = "into") -> Tensor:
    """The tensor to add to: ``into`` once checked, or zeros."""
    dtype = reference.wide(like.dtype)
    if into is None:
        return torch.zeros(tuple(shape), dtype=dtype, device=like.device)
    _checks.tensor(name, into)
    if tuple(into.shape) != tuple(shape) or into.dtype != dtype or not into.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} tensor of shape {list(shape)}, got {_checks.describe(into)}"
        )
    _checks.same_device(name, into, "output_grad", like)
    return into


def _one_place_dim(value: Tensor) -> Tensor:  # [N, *, C] -> [N, T, C]
    if value.dim() == 3:  # a view would cost a tiny layer a microsecond
        return value
    return value.reshape(value.shape[0], _product(value.shape[1:-1]), value.shape[-1])


def _channels_last_or_first(name: str, value: Tensor, channel_dim: int) -> Tensor:  # -> [N, A, C, B]
    if value.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions, got {_checks.describe(value)}")
    if channel_dim == -1 or channel_dim == value.dim() - 1:
        return value.reshape(value.shape[0], _product(value.shape[1:-1]), value.shape[-1], 1)
    if channel_dim == 1:
        return value.reshape(value.shape[0], 1, value.shape[1], _product(value.shape[2:]))
    raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim!r}")


def _shift(shift: Any, d: Tensor) -> Tensor:  # [C], [N, A, C, B] -> [C]
    value, dtype = _checks.float_tensor("shift", shift), reference.wide(d.dtype)
    if value.shape != d.shape[2:3] or value.dtype != dtype:
        raise ValueError(f"shift must be a {dtype} tensor of shape {[d.shape[2]]}, got {_checks.describe(value)}")
    _checks.same_device("shift", value, "output_grad", d)
    return value


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _spatial(name: str, value: Any, dims: int, minimum: int) -> list[int]:
    if not isinstance(value, (int, tuple, list, Sequence)):  # asking an abstract class alone takes a microsecond
        raise TypeError(f"{name} must be one integer or a sequence of {dims}, got {_checks.describe(value)}")
    values = [value] * dims if isinstance(value, int) else list(value)
    if len(values) != dims:
        raise ValueError(f"{name} must be one integer or {dims}, got {value!r}")
    return [_checks.integer(name, v, minimum=minimum) for v in values]


# --- public functions ------------------------------------------------------------------------------------------------


def sum_grad_squared_linear(
    output_grad: Tensor,  # [N, *, O]
    input: Tensor,  # [N, *, I]
    *,
    into: Tensor | None = None,  # [O, I]
    bias_into: Tensor | None = None,  # [O]
) -> Tensor:  # [O, I]
    r"""Sum over samples of the squared weight gradient of ``y = x W^T + b``.

    .. math:: S = \sum_n \Big(\sum_t d_{n,t} a_{n,t}^\top\Big)^2

    where ``d`` is the gradient of the summed per-sample losses at ``y`` and ``a`` the input; the square is taken
    element by element (the empirical Fisher's diagonal, Kunstner et al. 2019, eq. 3).

    Args:
        output_grad: ``[N, *, O]``, float32, float64, bfloat16 or float16; any strides. ``*`` may be empty.
        input: ``[N, *, I]`` with the same leading dimensions, dtype and device.
        into: ``[O, I]``, contiguous; the sum is added to it. Narrow inputs are summed in float32.
        bias_into: ``[O]``, the result's dtype; :func:`sum_grad_squared_bias` is added to it, at less than its price.

    Returns:
        ``[O, I]``: ``into``, or a new float32 tensor (float64 for float64 inputs).

    Raises:
        TypeError: an argument is no floating tensor, or dtypes differ.
        ValueError: shapes or devices differ.

    >>> d = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> a = torch.tensor([[1.0], [2.0]])
    >>> sum_grad_squared_linear(d, a)
    tensor([[37.],
            [ 4.]])
    """
    if into is not None and launch.added("linear", (into, bias_into), output_grad, input):
        return into
    d, a = _pair(output_grad, input)
    if d.dim() < 2 or d.shape[:-1] != a.shape[:-1]:
        raise ValueError(
            f"output_grad [N, *, O] and input [N, *, I] must share their leading dimensions, "
            f"got {list(d.shape)} and {list(a.shape)}"
        )
    total = _total(into, (d.shape[-1], a.shape[-1]), d)
    bias_total = None if bias_into is None else _total(bias_into, d.shape[-1:], d, "bias_into")
    launch.linear(total, _one_place_dim(d), _one_place_dim(a))
    if bias_total is not None:
        launch.bias(bias_total, _channels_last_or_first("output_grad", d, -1))
    return total


def sum_grad_squared_conv(
    output_grad: Tensor,  # [N, O, *spatial_out]
    input: Tensor,  # [N, C, *spatial_in]
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    into: Tensor | None = None,  # [O, C / groups, *kernel_size]
) -> Tensor:  # [O, C / groups, *kernel_size]
    """Sum over samples of the squared weight gradient of a convolution in 1, 2 or 3 dimensions.

    The contraction of :func:`sum_grad_squared_linear` with the input's patches as ``a`` and the output's pixels as
    ``t``; patches are read in place, never unfolded. A transposed convolution is the same sum with the two tensors
    exchanged: its input as ``output_grad``, its output's gradient as ``input``.

    Args:
        output_grad: ``[N, O, *spatial_out]``, any strides (channels-last too).
        input: ``[N, C, *spatial_in]``, same dtype and device.
        kernel_size: one integer, or one per spatial dimension; so are ``stride``, ``padding`` and ``dilation``.
        stride: step of the window.
        padding: zeros on both sides.
        dilation: step between the window's places.
        groups: groups of channels that do not mix; divides ``O`` and ``C``.
        into: ``[O, C / groups, *kernel_size]``, contiguous; the sum is added to it.

    Returns:
        ``[O, C / groups, *kernel_size]``: ``into``, or a new float32 tensor (float64 for float64 inputs).

    Raises:
        TypeError: an argument is no floating tensor, or dtypes differ.
        ValueError: shapes, devices or the geometry do not fit each other.

    >>> sum_grad_squared_conv(torch.ones(2, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]], [[1.0, 0.0, 0.0]]]), 2)
    tensor([[[10., 25.]]])
    """
    d, x = _pair(output_grad, input)
    dims = d.dim() - 2
    if dims not in (1, 2, 3) or x.dim() != d.dim() or x.shape[0] != d.shape[0]:
        raise ValueError(
            f"output_grad [N, O, *] and input [N, C, *] must share N and have 1 to 3 spatial dimensions, "
            f"got {list(d.shape)} and {list(x.shape)}"
        )
    kernel = _spatial("kernel_size", kernel_size, dims, 1)
    steps = _spatial("stride", stride, dims, 1)
    pads = _spatial("padding", padding, dims, 0)
    dilations = _spatial("dilation", dilation, dims, 1)
    _checks.integer("groups", groups, minimum=1)
    if d.shape[1] % groups or x.shape[1] % groups:
        raise ValueError(f"groups must divide the channels {d.shape[1]} and {x.shape[1]}, got {groups}")
    sizes = zip(d.shape[2:], x.shape[2:], kernel, steps, pads, dilations, strict=True)
    for i, (size, input_size, taps, step, pad, dilation_) in enumerate(sizes):
        reach = (size - 1) * step + (taps - 1) * dilation_ + 1
        if size > 0 and reach > input_size + 2 * pad:
            raise ValueError(
                f"output_grad's spatial size {size} needs {reach} padded input places in dimension {i}, "
                f"got {input_size} and padding {pad}"
            )
    total = _total(into, (d.shape[1], x.shape[1] // groups, *kernel), d)
    launch.conv(total, d, x, kernel, steps, pads, dilations, groups)
    return total


def sum_grad_squared_bias(
    output_grad: Tensor,  # [N, *, C] or [N, C, *]
    *,
    channel_dim: int = -1,
    into: Tensor | None = None,  # [C]
) -> Tensor:  # [C]
    """Sum over samples of the squared gradient of a bias: ``sum_n (sum_t d[n,t,:])^2``.

    Args:
        output_grad: ``[N, *, C]`` with ``channel_dim=-1`` (linear layers), ``[N, C, *]`` with 1 (convolutions).
        channel_dim: where the bias's dimension is: 1 or -1.
        into: ``[C]``; the sum is added to it.

    Returns:
        ``[C]``: ``into``, or a new float32 tensor (float64 for float64 inputs).

    Raises:
        TypeError: an argument is no floating tensor.
        ValueError: shapes do not fit.

    >>> sum_grad_squared_bias(torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]]))
    tensor([18.])
    """
    if into is not None and channel_dim in (1, -1) and launch.added("bias", (into,), output_grad, channel_dim):
        return into
    d = _channels_last_or_first("output_grad", _checks.float_tensor("output_grad", output_grad), channel_dim)
    total = _total(into, (d.shape[2],), d)
    launch.bias(total, d)
    return total


def sum_grad_squared_scale(
    output_grad: Tensor,  # [N, *, C] or [N, C, *]
    input: Tensor,  # the same shape
    *,
    channel_dim: int = -1,
    shift: Tensor | None = None,  # [C]
    into: Tensor | None = None,  # [C]
    bias_into: Tensor | None = None,  # [C]
) -> Tensor:  # [C]
    """Sum over samples of the squared gradient of a factor ``y = (x - shift) * w``.

    ``sum_n (sum_t d[n,t,:] (x[n,t,:] - shift))^2``, in one pass and with the difference in the result's precision. For
    a normalisation layer ``input`` is the normalised activation; for batch normalisation by running statistics it is
    the activation and ``shift`` the running mean; for PReLU it is ``min(x, 0)``.

    Args:
        output_grad: ``[N, *, C]`` with ``channel_dim=-1``, ``[N, C, *]`` with 1.
        input: what the factor multiplies: the same shape, dtype and device.
        channel_dim: where the factor's dimension is: 1 or -1.
        shift: ``[C]``, the result's dtype; 0 where not given.
        into: ``[C]``; the sum is added to it.
        bias_into: ``[C]``, the result's dtype; :func:`sum_grad_squared_bias` is added to it, on a GPU at nearly no
            price.

    Returns:
        ``[C]``: ``into``, or a new float32 tensor (float64 for float64 inputs).

    Raises:
        TypeError: an argument is no floating tensor, or dtypes differ.
        ValueError: shapes or devices differ.

    >>> sum_grad_squared_scale(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]))
    tensor([9., 1.])
    >>> sum_grad_squared_scale(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]), shift=torch.tensor([1.0, 0.5]))
    tensor([4., 0.])
    """
    if (
        into is not None
        and bias_into is None
        and channel_dim in (1, -1)
        and launch.added("scale", (into,), output_grad, input, shift, channel_dim)
    ):
        return into
    d, x = _pair(output_grad, input)
    if d.shape != x.shape:
        raise ValueError(f"input must have output_grad's shape {list(d.shape)}, got {list(x.shape)}")
    d = _channels_last_or_first("output_grad", d, channel_dim)
    if shift is not None:
        shift = _shift(shift, d).contiguous()
    total = _total(into, (d.shape[2],), d)
    bias_total = None if bias_into is None else _total(bias_into, (d.shape[2],), d, "bias_into")
    launch.scale(total, d, _channels_last_or_first("input", x, channel_dim), shift, bias_total)
    return total


def sum_grad_squared_norm(
    output_grad: Tensor,  # [N, *, C]
    input: Tensor,  # [N, *, C]
    mean: Tensor,  # [N, *, 1]
    rstd: Tensor,  # [N, *, 1]
    *,
    into: Tensor | None = None,  # [C]
    bias_into: Tensor | None = None,  # [C]
) -> Tensor:  # [C]
    """Sum over samples of the squared gradient of a layer normalisation's factor, ``y = (x - mean) * rstd * w + b``.

    :func:`sum_grad_squared_scale` of the normalised activation, which is not formed for plain tensors on the CPU.

    Args:
        output_grad: ``[N, *, C]``, any strides.
        input: what was normalised: the same shape, dtype and device.
        mean: ``[N, *, 1]``, the result's dtype.
        rstd: 1 / standard deviation, the same.
        into: ``[C]``; the sum is added to it.
        bias_into: ``[C]``, the result's dtype; :func:`sum_grad_squared_bias` is added to it, at less than its price.

    Returns:
        ``[C]``: ``into``, or a new float32 tensor (float64 for float64 inputs).

    Raises:
        TypeError: an argument is no floating tensor, or dtypes differ.
        ValueError: shapes or devices differ.

    >>> mean, rstd = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    >>> sum_grad_squared_norm(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.5]]), mean, rstd)
    tensor([16.,  4.])
    """
    if into is not None and launch.added("norm", (into, bias_into), output_grad, input, mean, rstd):
        return into
    d, x = _pair(output_grad, input)
    if d.dim() < 2 or d.shape != x.shape:
        raise ValueError(
            "output_grad [N, *, C] and input must have the same shape, of 2 dimensions or more, "
            f"got {list(d.shape)} and {list(x.shape)}"
        )
    dtype = reference.wide(d.dtype)
    for name, value in (("mean", mean), ("rstd", rstd)):
        if _checks.float_tensor(name, value).dtype != dtype or value.shape != (*d.shape[:-1], 1):
            raise ValueError(
                f"{name} must be a {dtype} tensor of shape {[*d.shape[:-1], 1]}, got {_checks.describe(value)}"
            )
        _checks.same_device(name, value, "output_grad", d)
    total = _total(into, d.shape[-1:], d)
    bias_total = None if bias_into is None else _total(bias_into, d.shape[-1:], d, "bias_into")
    places = d.shape[0], _product(d.shape[1:-1])
    launch.norm(
        total,
        bias_total,
        *(_one_place_dim(d), _one_place_dim(x), mean.reshape(places), rstd.reshape(places)),
    )
    return total


def sum_grad_squared_embedding(
    output_grad: Tensor,  # [N, *, E]
    indices: Tensor,  # [N, *], int64
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    into: Tensor | None = None,  # [num_embeddings, E]
) -> Tensor:  # [num_embeddings, E]
    r"""Sum over samples of the squared gradient of a table of rows: equal indices are summed per sample first.

    .. math:: S_v = \sum_n \Big(\sum_{t: \mathrm{indices}_{n,t} = v} d_{n,t}\Big)^2

    Args:
        output_grad: ``[N, *, E]``.
        indices: ``[N, *]``, int64 or int32, each at least 0 and below ``num_embeddings``.
        num_embeddings: rows of the table.
        padding_idx: a row that gets no gradient.
        into: ``[num_embeddings, E]``, contiguous; the sum is added to it.

    Returns:
        ``[num_embeddings, E]``: ``into``, or a new float32 tensor (float64 for float64 inputs).

    Raises:
        TypeError: ``output_grad`` is no floating tensor or ``indices`` no integer tensor.
        ValueError: shapes or devices differ.

    >>> d = torch.tensor([[[1.0], [2.0], [5.0]]])
    >>> sum_grad_squared_embedding(d, torch.tensor([[0, 0, 2]]), 3)
    tensor([[ 9.],
            [ 0.],
            [25.]])
    """
    d = _checks.float_tensor("output_grad", output_grad)
    if _checks.tensor("indices", indices).dtype not in (torch.int64, torch.int32):
        raise TypeError(f"indices must be an int64 or int32 tensor, got {_checks.describe(indices)}")
    if d.dim() < 2:
        raise ValueError(f"output_grad must have at least 2 dimensions, got {_checks.describe(d)}")
    if d.shape[:-1] != indices.shape:
        raise ValueError(f"indices must have shape {list(d.shape[:-1])}, got {list(indices.shape)}")
    _checks.same_device("indices", indices, "output_grad", d)
    _checks.integer("num_embeddings", num_embeddings, minimum=1)
    row = -1 if padding_idx is None else _checks.integer("padding_idx", padding_idx, minimum=0)
    if row >= num_embeddings:
        raise ValueError(f"padding_idx must be below num_embeddings {num_embeddings}, got {padding_idx}")
    total = _total(into, (num_embeddings, d.shape[-1]), d)
    d = _one_place_dim(d)
    launch.embedding(total, d, indices.reshape(d.shape[:2]).long(), row)
    return total
