"""The gradients of batch normalisation by running statistics, of each sample alone, on the CPU: in one pass.

For the Fisher information a weight's and a bias's gradient are needed sample by sample, and the input's beside them:
apart, each of them would read the output's gradient from memory again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from limpet import _checks, _core, _launch

_PLACES = 8  # of a channel: with fewer, whole vectors are not to be had


def is_plain(output_grad: Tensor, input: Tensor | None, mean: Tensor, factor: Tensor) -> bool:
    """Whether :func:`batch_norm_grads` takes these tensors, and they have so many places that it is faster."""
    tensors = [output_grad, mean, factor] if input is None else [output_grad, mean, factor, input]
    return (
        output_grad.dim() > 2
        and output_grad.numel() >= _PLACES * output_grad.shape[0] * output_grad.shape[1]
        and output_grad.dtype in (torch.float32, torch.float64)
        and all(type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)
        and all(
            t.dtype == output_grad.dtype and t.device.type == "cpu" and t.is_contiguous() and not t.is_neg()
            for t in tensors
        )
    )


def batch_norm_grads(
    output_grad: Tensor,  # [N, C, *]
    input: Tensor | None,  # [N, C, *]
    mean: Tensor,  # [C]
    factor: Tensor,  # [C]
) -> tuple[Tensor, Tensor | None, Tensor]:  # [N, C, *], [N, C], [N, C]
    r"""Of :math:`y = (x - \mu) f + b`, the gradients in ``x``, and of each sample in ``f`` and ``b``.

    :math:`dx = f \, dy`, :math:`df_n = \sum_t dy_{nt} (x_{nt} - \mu)`, :math:`db_n = \sum_t dy_{nt}` over the places
    ``*`` of a channel. With :math:`f = w / \sigma` the weight's gradient is :math:`df / \sigma`.

    Args:
        output_grad: ``[N, C, *]``, float32 or float64, on the CPU.
        input: the same shape; None where ``df`` is not wanted.
        mean: ``[C]``.
        factor: ``[C]``.

    Returns:
        ``dx``, ``df`` (None without an input) and ``db``, contiguous.

    Raises:
        TypeError: a tensor is of another dtype.
        ValueError: a shape or a device is not as above.

    >>> d, x = torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 5.0]]])
    >>> batch_norm_grads(d, x, torch.tensor([1.0]), torch.tensor([10.0]))
    (tensor([[[10., 20.]]]), tensor([[10.]]), tensor([[3.]]))
    """
    if output_grad.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"output_grad must be float32 or float64, got {_checks.describe(output_grad)}")
    if output_grad.dim() < 2 or output_grad.device.type != "cpu":
        raise ValueError(f"output_grad must be [N, C, *] and lie on the CPU, got {_checks.describe(output_grad)}")
    channels = output_grad.shape[1:2]
    for name, tensor, shape in (
        ("input", input, output_grad.shape),
        ("mean", mean, channels),
        ("factor", factor, channels),
    ):
        if tensor is None:
            continue
        if tensor.dtype != output_grad.dtype:
            raise TypeError(f"{name} must be {output_grad.dtype} as output_grad is, got {_checks.describe(tensor)}")
        if tensor.shape != shape or tensor.device != output_grad.device:
            raise ValueError(f"{name} must be {list(shape)} on the CPU, got {_checks.describe(tensor)}")
    d, mean, factor = (t.detach().contiguous() for t in (output_grad, mean, factor))
    x = None if input is None else input.detach().contiguous()
    dx, of_bias = torch.empty_like(d), d.new_empty(d.shape[:2])
    of_weight = None if x is None else torch.empty_like(of_bias)
    _core.batch_norm_grads(
        dx.data_ptr(),
        0 if of_weight is None else of_weight.data_ptr(),
        of_bias.data_ptr(),
        d.data_ptr(),
        0 if x is None else x.data_ptr(),
        mean.data_ptr(),
        factor.data_ptr(),
        (*d.shape[:2], d.shape[2:].numel()),
        _launch.DTYPE_CODES[d.dtype],
        _launch.threads(),
    )
    return dx, of_weight, of_bias
