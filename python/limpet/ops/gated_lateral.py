"""Gated lateral family: one column of a network lets in what an earlier one computed, through a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, _launch, reference
from limpet.ops import _gated_lateral_launch as launch

# --- autograd --------------------------------------------------------------------------------------------------------


def _gradients(ctx: Any, grad: Tensor) -> Sequence[Tensor | None]:
    """The gradients at ``x``, ``h``, ``weight`` and ``bias``, those that are wanted."""
    x, h, weight, bias, product = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:4]
    if torch.is_grad_enabled() or _transformed(grad):
        # A graph of the gradient itself was asked for: the reference is plain torch, and differentiable again.
        product = reference.gate_product(h, weight, ctx.channel_dim)
        grads = reference.gated_lateral_backward(grad, x, h, weight, bias, product, ctx.channel_dim)
    else:
        grads = launch.backward(grad, x, h, weight, bias, product, ctx.channel_dim, wanted)
    return [g if want else None for g, want in zip(grads, wanted, strict=True)]


class _GatedLateral(torch.autograd.Function):
    """The op with its gradient; torch.compile refuses a function that has a ``jvp`` (forward mode)."""

    @staticmethod
    def forward(
        x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int, keep_product: bool
    ) -> tuple[Tensor, Tensor]:
        return launch.forward(x, h, weight, bias, channel_dim, keep_product)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.channel_dim = inputs[4]
        ctx.save_for_backward(*inputs[:4], output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        return *_gradients(ctx, grad), None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        channel_dim: int,
        keep_product: bool,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        def both(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            y = reference.gated_lateral(x, h, weight, bias, channel_dim)
            return y, torch.zeros_like(y[:0])  # backward computes the product itself

        return torch.vmap(both, in_dims=in_dims[:4])(x, h, weight, bias), (0, 0)


class _PlainGatedLateral(torch.autograd.Function):
    """The same for plain tensors on the CPU, past the dispatcher.

    A function with a ``setup_context``, which ``torch.func`` needs, costs four times as much to call as one without:
    a tenth of a small lateral.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int) -> Tensor:
        y, product = launch.forward_cpu(x, h, weight, bias, channel_dim, True)
        ctx.channel_dim = channel_dim
        ctx.save_for_backward(x, h, weight, bias, product)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not _plain(grad) or torch._C._functorch.is_legacy_batchedtensor(grad):
            return *_gradients(ctx, grad), None
        x, h, weight, bias, product = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        return *launch.backward_cpu(grad, x, h, weight, bias, product, ctx.channel_dim, wanted), None


_PLAIN = (Tensor, torch.nn.Parameter)


def _plain(*tensors: Tensor) -> bool:
    """Whether the core may be called past the dispatcher, which costs as much as a small pass."""
    if torch.compiler.is_dynamo_compiling() or torch._C._are_functorch_transforms_active():  # whose tensors look plain
        return False
    return all(type(t) in _PLAIN and t.is_cpu for t in tensors)


def _transformed(grad: Tensor) -> bool:
    """Whether a gradient may be one of ``torch.func``'s, or many (``is_grads_batched``)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


# --- validation ------------------------------------------------------------------------------------------------------


def _plain_and_valid(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int) -> bool:
    """Whether tensors are plain, no autocast casts them, and all the checks pass: in half of the checks' time.

    Between two products nothing of this is in the processor's caches: the checks took 5 % of a lateral of 256 x 256.
    """
    tensors = (x, h, weight) if bias is None else (x, h, weight, bias)
    if not _plain(*tensors) or torch.is_autocast_enabled("cpu") or channel_dim not in (1, -1):
        return False
    dtype = x.dtype
    for t in tensors:
        if t.is_nested or t.layout is not torch.strided or t.dtype is not dtype:
            return False
    if dtype not in _launch.DTYPE_CODES or x.dim() <= max(channel_dim, 0):
        return False
    channels = x.shape[channel_dim]
    fits = h.shape == x.shape and weight.shape == (channels, channels)
    return fits and (bias is None or bias.shape == (channels,))


def _validate(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, channel_dim: int) -> None:
    if channel_dim not in (1, -1):
        raise ValueError(f"channel_dim must be 1 or -1, got {channel_dim!r}")
    if x.dim() < (1 if channel_dim == -1 else 2):
        raise ValueError(f"x must have a dimension {channel_dim}, got {_checks.describe(x)}")
    channels = x.shape[channel_dim]
    _beside("h", h, x.shape, x)
    _beside("weight", weight, (channels, channels), x)
    if bias is not None:
        _beside("bias", bias, (channels,), x)


def _beside(name: str, value: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have x's dtype {x.dtype}, got {value.dtype}")
    if value.shape != shape:
        raise ValueError(
            f"{name} must be of shape {list(shape)} beside x of shape {list(x.shape)}, got {_checks.describe(value)}"
        )
    _checks.same_device(name, value, "x", x)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As a linear layer's inputs are cast: float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


# --- public functions ------------------------------------------------------------------------------------------------


def gated_lateral(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim=1
    h: Tensor,  # as x
    weight: Tensor,  # [H, H]
    bias: Tensor | None = None,  # [H]
    *,
    channel_dim: int = -1,
) -> Tensor:  # as x
    r"""Mix what an earlier column computed into this one, through a learned gate.

    .. math:: y = x \odot g + h \odot (1 - g), \qquad g = \sigma(W h + b)

    ``x`` are this column's activations and ``h`` those of an earlier one, of the same width. The gate is a variant of
    our own: the laterals of progressive networks (Rusu et al. 2016) add an adapter's output and have no gate. With
    ``channel_dim=1`` the gate is a 1x1 convolution over the channels, with any number of spatial dimensions.

    Differentiable in all four tensors, twice. Forward costs one matrix product and one pass, backward two products and
    one pass; what backward keeps beside the inputs is the product, from which it computes the gate again. Gradients
    that nobody asks for are not computed: an earlier column that is frozen saves a product.

    Args:
        x: ``[*, H]``, or ``[N, H, *]`` with ``channel_dim=1``; float32, float64, bfloat16 or float16; any strides.
        h: of the same shape, dtype and device.
        weight: ``[H, H]``, as in :func:`torch.nn.functional.linear`.
        bias: ``[H]``, or none.
        channel_dim: where the channels are: -1, or 1.

    Returns:
        Of ``x``'s shape and dtype. The gate and the mixture are computed in float32 where the dtype is narrower. Under
        autocast all tensors, and so the result, are of autocast's dtype, as in a linear layer.

    Raises:
        TypeError: an argument is no floating tensor, or dtypes differ.
        ValueError: shapes or devices differ, ``weight`` is not square, or ``channel_dim`` is neither 1 nor -1.

    >>> x, h = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]])
    >>> gated_lateral(x, h, torch.zeros(2, 2))  # the gate is half open
    tensor([[2., 1.]])
    >>> gated_lateral(x, h, torch.zeros(2, 2), torch.tensor([-100.0, 100.0]))
    tensor([[3., 2.]])
    """
    graph = torch.is_grad_enabled()
    y: Tensor
    if _plain_and_valid(x, h, weight, bias, channel_dim):
        if graph:
            y = _PlainGatedLateral.apply(x, h, weight, bias, channel_dim)
        else:
            y = launch.forward_cpu(x, h, weight, bias, channel_dim, False)[0]
        return y
    _checks.float_tensor("x", x), _checks.float_tensor("h", h), _checks.float_tensor("weight", weight)
    if bias is not None:
        _checks.float_tensor("bias", bias)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, h, weight = (_autocast(t, dtype) for t in (x, h, weight))
        bias = None if bias is None else _autocast(bias, dtype)
    _validate(x, h, weight, bias, channel_dim)
    y = _GatedLateral.apply(x, h, weight, bias, channel_dim, graph)[0]
    return y


def gated_laterals(
    x: Tensor,  # [*, H], or [N, H, *] with channel_dim=1
    hs: Sequence[Tensor],  # as x, each
    weights: Sequence[Tensor],  # [H, H] each
    biases: Sequence[Tensor | None] | None = None,  # [H] each
    *,
    combine: str = "chain",
    channel_dim: int = -1,
) -> Tensor:  # as x
    r"""Several gated laterals, one from each earlier column.

    ``"chain"`` gates one after another, each on what the one before gave: :math:`y_0 = x`,
    :math:`y_{j+1} = y_j g_j + h_j (1 - g_j)`. So the last has the last word, and the result is a mixture whose
    factors sum to 1. ``"sum"`` adds what each alone would change: :math:`y = x + \sum_j (1 - g_j) (h_j - x)`, which
    does not depend on the order. For one lateral both are :func:`gated_lateral`, of which this is a loop: the time
    goes into the products, of which each lateral has its own.

    Args:
        x: as in :func:`gated_lateral`, and so are the dtypes, shapes and devices of all tensors.
        hs: activations of earlier columns; none at all gives ``x``.
        weights: one for each.
        biases: one for each, any of them ``None``; or none at all.
        combine: ``"chain"`` or ``"sum"``.
        channel_dim: where the channels are: -1, or 1.

    Raises:
        TypeError: an argument is no list of tensors, or as in :func:`gated_lateral`.
        ValueError: lists differ in length, ``combine`` is another word, or as in :func:`gated_lateral`.

    >>> x, zeros = torch.tensor([[1.0, 1.0]]), torch.zeros(2, 2)
    >>> hs = [torch.tensor([[3.0, 5.0]]), torch.tensor([[0.0, 1.0]])]
    >>> gated_laterals(x, hs, [zeros, zeros])
    tensor([[1., 2.]])
    >>> gated_laterals(x, hs, [zeros, zeros], combine="sum")
    tensor([[1.5000, 3.0000]])
    """
    _checks.one_of("combine", combine, ("chain", "sum"))
    lists: list[tuple[str, Any]] = [("hs", hs), ("weights", weights)]
    if biases is not None:
        lists.append(("biases", biases))
    for name, value in lists:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {_checks.describe(value)}")
        if len(value) != len(hs):
            raise ValueError(f"{name} must have as many tensors as hs ({len(hs)}), got {len(value)}")
    result = x
    for h, weight, bias in zip(hs, weights, biases or [None] * len(hs), strict=True):
        if combine == "chain":
            result = gated_lateral(result, h, weight, bias, channel_dim=channel_dim)
        else:
            change = gated_lateral(x, h, weight, bias, channel_dim=channel_dim)
            result = change if result is x else result + (change - x)
    return result
