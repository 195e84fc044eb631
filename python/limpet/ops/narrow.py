"""Narrow storage: importances and anchors of a quadratic penalty in fewer bytes than a float32 has.

The packed tensors are plain one-dimensional ones, so that they move between devices, are saved and are sent as any
other; :func:`limpet.ops.quadratic_penalty` and its relatives read them where they lie. What each format costs in
accuracy was measured: docs/narrow.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limpet import _checks, reference

# The format that a packed tensor's dtype stands for.
PACKED_IMPORTANCES = {torch.uint8: "log8"}
PACKED_ANCHORS = {torch.int16: "fixed16", torch.uint8: "split24"}
PACKED_DTYPES = {format: dtype for formats in (PACKED_IMPORTANCES, PACKED_ANCHORS) for dtype, format in formats.items()}
_FORMATS = tuple(PACKED_ANCHORS.values())


def packed_size(format: str, numel: int) -> int:
    """Elements of the packed tensor (bytes, or pairs of bytes for fixed16) that holds ``numel`` values."""
    blocks = -(-numel // reference.NARROW_BLOCK)
    if format == "log8":
        return numel + -numel % 16 + 2 * blocks
    if format == "fixed16":
        return numel + -numel % 8 + blocks
    return 2 * numel + -2 * numel % 16 + numel


def pack_importance(
    importance: Tensor,  # [*]
    *,
    generator: torch.Generator | None = None,
) -> Tensor:  # [bytes] uint8
    r"""Importances in 8 bits each, spaced logarithmically below the largest of their block (``log8``).

    .. math:: \text{bits}(F_i) \approx \text{bits}(\text{top}) - 2^{12} (255 - c_i)^2

    on the bits of float32, which are a logarithm in straight pieces; ``c = 0`` is exactly 0. A block is 1024 elements
    in row-major order and ``top`` its largest value, cut to bfloat16, so that nothing is rounded above the largest.
    Codes reach 31.5 octaves (9.5 decades) below it; half of the lowest and less becomes 0. The relative error is at
    most 0.8 % at the top, 2.2 % in the first octave, 4.5 % in the first four, 8.5 % in sixteen and 12.5 % at the end:
    most of a penalty's gradient comes from the largest importances, and the small ones still count.

    A running sum that is stored anew after each of many tasks stands still once a task adds less than half a step.
    Give a ``generator`` then: values are rounded up or down at random, so that the sum is right on average.

    Args:
        importance: float32, bfloat16 or float16, finite and at least 0, of any shape and layout.
        generator: what the rounding is drawn from, on the same device; to the nearest code where there is none.

    Returns:
        1 byte an element, to a multiple of 16, and 2 for each block of 1024. Same device, and one dimension.

    Raises:
        TypeError: ``importance`` is no dense tensor of one of these dtypes.
        ValueError: a value is negative or not finite.

    >>> packed = pack_importance(torch.tensor([1.0, 0.0, 1e-6]))
    >>> unpack_importance(packed, [3])
    tensor([1.0000e+00, 0.0000e+00, 1.0263e-06])
    """
    _narrowable("importance", importance)
    if importance.numel():
        low, high = importance.detach().aminmax()
        if not (low >= 0 and high < math.inf):
            raise ValueError(f"importance must be finite and at least 0, got values from {low:g} to {high:g}")
    return reference.pack_log8(importance.detach(), generator)


def unpack_importance(
    packed: Tensor,  # [bytes] uint8
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values that :func:`pack_importance` kept.

    Raises:
        TypeError: ``packed`` is no tensor of uint8.
        ValueError: it does not hold as many elements as ``shape`` has.

    >>> unpack_importance(pack_importance(torch.tensor([[2.0], [0.0]])), [2, 1])
    tensor([[2.],
            [0.]])
    """
    _packed("packed", packed, shape, PACKED_IMPORTANCES)
    return reference.unpack_log8(packed, shape)


def pack_anchor(
    anchor: Tensor,  # [*]
    format: str = "fixed16",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:  # [bytes / 2] int16, or [bytes] uint8
    """Anchors in 2 or 3 bytes each.

    ``"fixed16"``: 16-bit integers times a scale, which a block of 1024 elements in row-major order shares. The error is
    at most 1.54e-5 of the block's largest magnitude. A bfloat16 has as many bytes and an error of up to 2e-3 of each
    element, since it spends half of its bits on exponents that weights of one layer share.

    ``"split24"``: the upper 24 bits of the float32, as a bfloat16 and 8 more bits of mantissa. The error is at most
    1.53e-5 of each element.

    The penalty's gradient is a small difference of close numbers, so the anchor's error is to be compared with how far
    the parameters move, not with their size.

    A running mean that is stored anew after each of many tasks stands still once a task moves it by less than half a
    step. Give a ``generator`` then, as for :func:`pack_importance`.

    Args:
        anchor: float32, bfloat16 or float16, finite, of any shape and layout.
        format: ``"fixed16"`` or ``"split24"``.
        generator: what the rounding is drawn from, on the same device; to the nearest value where there is none.

    Returns:
        A tensor of one dimension on the same device: int16 with 2 bytes an element and 2 for each block, or uint8 with
        3 bytes an element. (Padding adds up to 15.)

    Raises:
        TypeError: ``anchor`` is no dense tensor of one of these dtypes.
        ValueError: a value is not finite, or there is no such format.

    >>> anchor = torch.tensor([0.1, -0.2])
    >>> unpack_anchor(pack_anchor(anchor), [2])
    tensor([ 0.1000, -0.2000])
    """
    _checks.one_of("format", format, _FORMATS)
    _narrowable("anchor", anchor)
    if anchor.numel():
        low, high = anchor.detach().aminmax()
        if not (low > -math.inf and high < math.inf):
            raise ValueError(f"anchor must be finite, got values from {low:g} to {high:g}")
    values = anchor.detach()
    if generator is not None:
        values = values.float()
        values = moved_at_random(
            values, _fixed16_steps(values) if format == "fixed16" else steps(values, 15), generator
        )
    return (reference.pack_fixed16 if format == "fixed16" else reference.pack_split24)(values)


def unpack_anchor(
    packed: Tensor,  # [bytes / 2] int16, or [bytes] uint8
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values that :func:`pack_anchor` kept.

    Raises:
        TypeError: ``packed`` is no tensor of int16 or uint8.
        ValueError: it does not hold as many elements as ``shape`` has.

    >>> unpack_anchor(pack_anchor(torch.tensor([[0.5], [-1.0]]), "split24"), [2, 1])
    tensor([[ 0.5000],
            [-1.0000]])
    """
    format = _packed("packed", packed, shape, PACKED_ANCHORS)
    return (reference.unpack_fixed16 if format == "fixed16" else reference.unpack_split24)(packed, shape)


# --- rounding at random, and packed tensors in pieces -----------------------------------------------------------------


def moved_at_random(values: Tensor, steps: Tensor, generator: torch.Generator) -> Tensor:  # [*], [*] -> [*]
    """Values moved by up to half a step: rounded to the nearest multiple of it they are then right on average."""
    noise = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    return torch.addcmul(values, noise, steps)


def steps(values: Tensor, mantissa: int) -> Tensor:  # [*] float32 -> [*]
    """From each value to the next that has so many bits of mantissa; 0 for those too small to have an exponent."""
    return (values.view(torch.int32) & 0x7F800000).view(torch.float32) * 2.0**-mantissa


def _fixed16_steps(values: Tensor) -> Tensor:  # [*] float32 -> [*]
    flat = values.flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % reference.NARROW_BLOCK)).view(-1, reference.NARROW_BLOCK)
    scales = blocks.abs().amax(dim=1) / 32767  # before bfloat16 rounds it up, by less than a hundredth
    return scales.repeat_interleave(reference.NARROW_BLOCK)[: flat.numel()].view(values.shape)


def unpack_piece(
    packed: Tensor,  # [bytes] uint8, or [bytes / 2] int16
    format: str,
    numel: int,
    begin: int,
    end: int,
) -> Tensor:  # [end - begin] float32
    """The values from ``begin``, where a block begins, to ``end`` of a packed tensor that holds ``numel``."""
    piece = torch.zeros(packed_size(format, end - begin), dtype=packed.dtype, device=packed.device)
    for to, part in zip(_parts(piece, format, end - begin), _parts(packed, format, numel, begin, end), strict=True):
        to.copy_(part)
    unpack = {"log8": reference.unpack_log8, "fixed16": reference.unpack_fixed16, "split24": reference.unpack_split24}
    return unpack[format](piece, [end - begin])


def pack_piece_(
    packed: Tensor,  # [bytes] uint8, or [bytes / 2] int16
    format: str,
    numel: int,
    begin: int,
    values: Tensor,  # [n] float32
    generator: torch.Generator | None = None,
) -> None:
    """Put values in the place of those from ``begin``, where a block begins, in a packed tensor of ``numel``."""
    if format == "log8":
        piece = pack_importance(values, generator=generator)
    else:
        piece = pack_anchor(values, format, generator=generator)
    end = begin + values.numel()
    for to, part in zip(_parts(packed, format, numel, begin, end), _parts(piece, format, end - begin), strict=True):
        to.copy_(part)


def _parts(packed: Tensor, format: str, numel: int, begin: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
    """The bytes that hold a piece: its codes, and its tops or scales (or, for split24, lower bits)."""
    data, end = packed.view(torch.uint8), numel if end is None else end
    width = 1 if format == "log8" else 2  # bytes of a code
    second = width * numel + -width * numel % 16
    if format == "split24":
        return data[2 * begin : 2 * end], data[second + begin : second + end]
    blocks = [2 * -(-k // reference.NARROW_BLOCK) for k in (begin, end)]
    return data[width * begin : width * end], data[second + blocks[0] : second + blocks[1]]


# --- validation -------------------------------------------------------------------------------------------------------


def _narrowable(name: str, value: Any) -> None:
    if _checks.float_tensor(name, value).dtype == torch.float64:
        raise TypeError(f"{name} must be a float32, bfloat16 or float16 tensor, got {_checks.describe(value)}")


def _packed(name: str, value: Any, shape: Sequence[int], formats: dict[torch.dtype, str]) -> str:
    if _checks.tensor(name, value).dtype not in formats:
        raise TypeError(f"{name} must be a {' or '.join(map(str, formats))} tensor, got {_checks.describe(value)}")
    format = formats[value.dtype]
    size = packed_size(format, math.prod(shape))
    if list(value.shape) != [size]:
        raise ValueError(
            f"{name} must be of shape [{size}] to hold {list(shape)} as {format}, got {_checks.describe(value)}"
        )
    return format
