"""The gradient at the input of convolutions with kernels of 3 x 3, on the CPU: in 0.5 to 0.75 of torch's time.

The Fisher information needs no gradient of the weights beside the squared ones, so that this is half of its backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limpet import _checks, _core, _launch

_CHANNELS = 16  # of a vector's lanes: with fewer, most of them would be empty
_PLACES = 16  # of a picture: with no more, much of the tiles is padding, and torch's convolution leaves that out
_TILES = 512  # of all pictures: with fewer, transforming the kernels takes as long as tiles save


def is_faster(
    output_grad: Tensor,  # [N, O, Y0, Y1]
    input: Tensor,  # [N, C, X0, X1]
    weight: Tensor,  # [O, C / groups, K0, K1]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Whether :func:`conv_input_grad` takes this convolution, and is expected to be faster than torch.

    Pictures with their channels last stay torch's: their gradient is to lie in memory as they do.
    """
    return (
        groups == 1
        and weight.shape[2:] == (3, 3)
        and (*stride, *dilation) == (1, 1, 1, 1)
        and max(padding) <= 2
        and min(weight.shape[:2]) >= _CHANNELS
        and input.shape[2:].numel() > _PLACES
        and input.shape[0] * ((input.shape[2] + 1) // 2) * ((input.shape[3] + 1) // 2) >= _TILES
        and output_grad.dtype == weight.dtype
        and output_grad.dtype in (torch.float32, torch.float64)
        and all(type(t) is Tensor and t.device.type == "cpu" for t in (output_grad, input))
        and output_grad.is_contiguous()
        and input.is_contiguous()
    )


def conv_input_grad(
    output_grad: Tensor,  # [N, O, Y0, Y1]
    weight: Tensor,  # [O, C, 3, 3]
    padding: Sequence[int],
) -> Tensor:  # [N, C, Y0 + 2 - 2 P0, Y1 + 2 - 2 P1]
    r"""The gradient of :math:`\sum dy \cdot \mathrm{conv2d}(x, w)` in ``x``, for a step of one and no dilation.

    Winograd's F(2x2, 3x3) (Lavin and Gray 2016, arXiv:1509.09308, section 4): 16 products for four places instead of
    36. In float32 its error is about that of a direct convolution.

    Args:
        output_grad: ``[N, O, Y0, Y1]``, float32 or float64, on the CPU.
        weight: ``[O, C, 3, 3]``, same dtype and device.
        padding: zeros on both sides of each dimension of the input, at most 2.

    Returns:
        ``[N, C, Y0 + 2 - 2 P0, Y1 + 2 - 2 P1]``, contiguous.

    Raises:
        TypeError: a tensor is of another dtype.
        ValueError: a shape, a device or the padding is not as above.

    >>> conv_input_grad(torch.ones(1, 1, 2, 2), torch.arange(9.0).view(1, 1, 3, 3), (1, 1))
    tensor([[[[ 8., 12.],
              [20., 24.]]]])
    """
    for name, tensor in (("output_grad", output_grad), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != output_grad.dtype:
            raise TypeError(f"{name} must be float32 or float64 as the other is, got {_checks.describe(tensor)}")
        if tensor.dim() != 4 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must have four dimensions and lie on the CPU, got {_checks.describe(tensor)}")
    if weight.shape[2:] != (3, 3) or weight.shape[0] != output_grad.shape[1]:
        raise ValueError(f"weight must be [{output_grad.shape[1]}, C, 3, 3], got {list(weight.shape)}")
    if len(padding) != 2 or not all(0 <= p <= 2 for p in padding):
        raise ValueError(f"padding must be two integers from 0 to 2, got {padding!r}")
    samples, out_channels, *size = output_grad.shape
    shape = (samples, weight.shape[1], *(y + 2 - 2 * p for y, p in zip(size, padding, strict=True)))
    if min(shape) < 1 or output_grad.numel() == 0:
        return output_grad.new_zeros([max(0, size) for size in shape])
    input_grad = output_grad.new_empty(shape)
    output_grad, weight = output_grad.detach().contiguous(), weight.detach().contiguous()
    geometry = (samples, out_channels, weight.shape[1]), tuple(size), tuple(padding)
    dtype, threads = _launch.DTYPE_CODES[output_grad.dtype], _launch.threads()
    workspace = _launch.workspace(_core.conv_input_grad_workspace(*geometry, dtype, threads), output_grad.device)
    _core.conv_input_grad(
        input_grad.data_ptr(),
        output_grad.data_ptr(),
        weight.data_ptr(),
        *geometry,
        dtype,
        workspace.data_ptr(),
        threads,
    )
    return input_grad
