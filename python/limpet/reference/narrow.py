"""Narrow storage: formats of importances and anchors in fewer bytes; csrc/math/narrow.h reads them.

A packed tensor has one dimension: the codes of all elements in row-major order, zeros up to a multiple of 16 bytes, and
what remains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from limpet.reference.dtypes import wide

NARROW_BLOCK = 1024  # elements that share a top or a scale
_DEPTH = 4096  # what a code's squared distance from 255 counts, in units of the last place of a float32


def _blocks(values: Tensor) -> Tensor:  # [*] -> [blocks, 1024] float32
    flat = values.flatten().float()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % NARROW_BLOCK)).view(-1, NARROW_BLOCK)


def _packed(first: Tensor, second: Tensor) -> Tensor:  # [n], [m] -> [bytes] uint8
    one, two = (part.contiguous().view(torch.uint8) for part in (first, second))
    return torch.cat([one, one.new_zeros(-one.numel() % 16), two])


def _unpacked(packed: Tensor, first_bytes: int) -> tuple[Tensor, Tensor]:  # [bytes] uint8 each
    return packed[:first_bytes].clone(), packed[first_bytes + -first_bytes % 16 :].clone()  # aligned for other dtypes


def _float_of(bits: Tensor) -> Tensor:  # [*] int32 -> [*] float32
    return bits.contiguous().view(torch.float32)


def pack_log8(
    importance: Tensor,  # [*], at least 0
    generator: torch.Generator | None = None,
) -> Tensor:  # [bytes] uint8
    """Eight bits an element: ``bits(value) = bits(top) - 4096 (255 - code)^2`` of float32s; code 0 is 0.

    ``top`` is the block's largest value, cut to bfloat16. Float32's bits are a logarithm in straight pieces, on which
    this rounds to the nearest code; with a generator to either neighbour at random, the nearer the likelier, and so
    does the top. What is below half of the smallest positive code becomes 0.
    """
    values = _blocks(importance.abs())  # no negative zeros
    bits = values.view(torch.int32)
    largest = bits.amax(dim=1, keepdim=True)  # [blocks, 1]
    threshold: Tensor | float = 0.5
    if generator is not None:
        dropped = torch.rand(largest.shape, generator=generator, device=bits.device)
        largest = largest + (dropped * 0x10000).int()
        threshold = torch.rand(bits.shape, generator=generator, device=bits.device)
    top = largest >> 16 << 16
    lowest = (top / _DEPTH).sqrt().floor().clamp(max=254)  # [blocks, 1]; deeper would be below the float 0
    square = (top - bits).clamp(min=0) / _DEPTH
    depth = square.sqrt().floor()
    depth = (depth + ((square - depth * depth) / (2 * depth + 1) > threshold)).minimum(lowest).int()
    decoded = _float_of(top - _DEPTH * depth * depth)
    codes = torch.where((values == 0) | (values < decoded / 2), 0, 255 - depth).to(torch.uint8)
    return _packed(codes.flatten()[: importance.numel()], (top.flatten() >> 16).to(torch.int16))


def unpack_log8(
    packed: Tensor,  # [bytes] uint8
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values of :func:`pack_log8`."""
    codes, tops = _unpacked(packed, math.prod(shape))
    top = tops.view(torch.int16).int().repeat_interleave(NARROW_BLOCK)[: codes.numel()] << 16
    depth = 255 - codes.int()
    return _float_of(torch.where(codes > 0, top - _DEPTH * depth * depth, 0)).view(list(shape))


def pack_fixed16(
    anchor: Tensor,  # [*]
) -> Tensor:  # [bytes / 2] int16
    """Sixteen bits an element: an integer times ``scale``, the block's largest magnitude / 32767 as a bfloat16.

    The product of 15 and 8 bits is exact in float32. The scale is rounded up.
    """
    values = _blocks(anchor)
    largest = values.abs().amax(dim=1, keepdim=True)
    scale = _float_of(((largest * (1 / 32767)).view(torch.int32) + 0xFFFF) >> 16 << 16)  # [blocks, 1]
    codes = torch.where(scale > 0, values / scale, 0.0).round().clamp(-32767, 32767).to(torch.int16)
    scales = (scale.flatten().view(torch.int32) >> 16).to(torch.int16)
    return _packed(codes.flatten()[: anchor.numel()], scales).view(torch.int16)


def unpack_fixed16(
    packed: Tensor,  # [bytes / 2] int16
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values of :func:`pack_fixed16`."""
    codes, scales = (part.view(torch.int16) for part in _unpacked(packed.view(torch.uint8), 2 * math.prod(shape)))
    scale = _float_of(scales.int() << 16).repeat_interleave(NARROW_BLOCK)[: codes.numel()]
    return (codes.float() * scale).view(list(shape))


def pack_split24(
    anchor: Tensor,  # [*]
) -> Tensor:  # [bytes] uint8
    """Twenty-four bits an element: a float32 rounded to its upper 24, as a bfloat16 and 8 more bits of mantissa."""
    bits = anchor.flatten().float().view(torch.int32)
    rounded = (bits + 0x7F + (bits >> 8 & 1)) >> 8  # to nearest even
    return _packed((rounded >> 8).to(torch.int16), (rounded & 0xFF).to(torch.uint8))


def unpack_split24(
    packed: Tensor,  # [bytes] uint8
    shape: Sequence[int],
) -> Tensor:  # [shape] float32
    """The values of :func:`pack_split24`."""
    high, low = _unpacked(packed, 2 * math.prod(shape))
    return _float_of(high.view(torch.int16).int() << 16 | low.int() << 8).view(list(shape))


def dense_importance(stored: Tensor, like: Tensor) -> Tensor:  # [*] or packed -> [*]
    """The values of an importance, however it is stored, in the dtype that results for ``like`` are given in."""
    values = unpack_log8(stored, like.shape) if stored.dtype == torch.uint8 else stored
    return values.to(wide(like.dtype))


def dense_anchor(stored: Tensor, like: Tensor) -> Tensor:  # [*] or packed -> [*]
    """The values of an anchor, however it is stored, in the dtype that results for ``like`` are given in."""
    if stored.dtype == torch.int16:
        stored = unpack_fixed16(stored, like.shape)
    elif stored.dtype == torch.uint8:
        stored = unpack_split24(stored, like.shape)
    return stored.to(wide(like.dtype))
