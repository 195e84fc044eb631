"""The contraction of the Fisher family: per-sample gradients of linear and convolution weights, squared and added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._packing import ALIGNED, packed, packed_bytes
from limpet.triton_kernels._tiles import (
    SPLIT_TF32,
    VECTOR_UNITS,
    Arithmetic,
    Tile,
    merge_cost,
    share,
    store_tile,
)
from limpet.triton_kernels._tuning import launch

# Copies of operands take about this much memory at a time: samples beyond it have their turn later.
PACKED_BYTES = 2**28


class Patches(NamedTuple):
    """How output places look at the input, in three dimensions; those of a linear layer look at themselves."""

    kernel: Sequence[int] = (1, 1, 1)
    stride: Sequence[int] = (1, 1, 1)
    padding: Sequence[int] = (0, 0, 0)
    dilation: Sequence[int] = (1, 1, 1)

    @property
    def are_places(self) -> bool:
        """Whether every output place is the input place of the same number."""
        return max(self.kernel) == max(self.stride) == 1 and max(self.padding) == 0


@triton.jit
def contraction_kernel(
    d_ptr,  # [parts, N, groups rows, T]
    x_ptr,  # [parts, N, groups columns, X0, X1, X2], with its padding
    partial_ptr,  # [shares, K0 K1 K2, groups rows, columns], contiguous; [groups rows, columns], added to, if ADD
    N,
    T,  # Y0 Y1 Y2
    rows,  # of a group
    columns,  # channels of a group
    Y1,
    Y2,
    inverse_Y1,  # 1 / Y1
    inverse_Y2,
    K0,
    K1,
    K2,
    step0,
    step1,
    step2,
    dilation0,
    dilation1,
    dilation2,
    d_stride_part,
    d_stride_n,
    d_stride_o,
    d_stride_t,
    x_stride_part,
    x_stride_n,
    x_stride_c,
    x_stride_0,
    x_stride_1,
    x_stride_2,
    groups,
    samples_each,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,  # float32 in two parts
    PATCHES: tl.constexpr,  # or output places are input places
    ONCE: tl.constexpr,  # T <= BLOCK_T
    ADD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``partial[s,o,c,k] = sum_{n in share s} (sum_t d[n,o,t] x[n,c,t step + k dilation])^2``, one place k a program.

    The gradient of a sample exists only as a tile in registers: it is squared and added when its last place
    is in. Samples and places are one loop, so that the loads of the next sample overlap the products of this one. As
    every column of a tile looks at the same place k of the kernel, an address is a part that depends on the channel
    plus one that depends on the output place.
    """
    kernel_places = K0 * K1 * K2
    tiles_i, tiles_o = tl.cdiv(columns, BLOCK_I), tl.cdiv(rows, BLOCK_O)
    k = tl.program_id(0) % kernel_places
    tile = tl.program_id(0) // kernel_places
    group = tile // (tiles_i * tiles_o)
    o = tile // tiles_i % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)  # [BLOCK_O]
    c = tile % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I)  # [BLOCK_I]
    places = tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * samples_each
    samples = tl.minimum(samples_each, N - first)

    # Offsets are 64 bits wide: an index times a stride may pass 2**31.
    d_row = d_ptr + (group * rows + o).to(tl.int64) * d_stride_o
    x_column = x_ptr + (group * columns + c).to(tl.int64) * x_stride_c
    if PATCHES:
        x_column += (k // (K1 * K2) * dilation0).to(tl.int64) * x_stride_0
        x_column += (k // K2 % K1 * dilation1).to(tl.int64) * x_stride_1
        x_column += (k % K2 * dilation2).to(tl.int64) * x_stride_2
    o_in, c_in = (o < rows)[:, None], (c < columns)[:, None]

    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    blocks = 1 if ONCE else tl.cdiv(T, BLOCK_T)
    for step in range(samples * blocks):
        n = (first + step // blocks).to(tl.int64)
        start = step % blocks * BLOCK_T
        t = start + places
        if PATCHES:
            y01 = _divide(t, Y2, inverse_Y2)
            y0 = _divide(y01, Y1, inverse_Y1)
            x_at = (y0 * step0).to(tl.int64) * x_stride_0
            x_at += ((y01 - y0 * Y1) * step1).to(tl.int64) * x_stride_1
            x_at += ((t - y01 * Y2) * step2).to(tl.int64) * x_stride_2
        else:
            x_at = t.to(tl.int64) * x_stride_2
        d_tile = d_row[:, None] + (n * d_stride_n + t.to(tl.int64) * d_stride_t)[None, :]
        x_tile = x_column[:, None] + (n * x_stride_n + x_at)[None, :]
        d_in, x_in = o_in & (t < T)[None, :], c_in & (t < T)[None, :]
        d = tl.load(d_tile, mask=d_in, other=0.0)  # [BLOCK_O, BLOCK_T]
        x = tl.load(x_tile, mask=x_in, other=0.0)  # [BLOCK_I, BLOCK_T]
        if SPLIT:
            # Matrix units cut off bits when they add: a block's products are summed apart, the small ones first, and
            # blocks are added by the vector units. The product of two low parts is below float32's last bit.
            low_d = tl.load(d_tile + d_stride_part, mask=d_in, other=0.0)
            low_x = tl.load(x_tile + x_stride_part, mask=x_in, other=0.0)
            block = tl.dot(low_d, x.trans(), input_precision="tf32")
            block = tl.dot(d, low_x.trans(), block, input_precision="tf32")
            block = tl.dot(d, x.trans(), block, input_precision="tf32")
            if ONCE:
                squares += block * block
            else:
                grad += block
        elif ONCE:
            block = tl.dot(d, x.trans(), input_precision=PRECISION)
            squares += block * block
        else:
            grad = tl.dot(d, x.trans(), grad, input_precision=PRECISION)
        if not ONCE:  # noqa: SIM102, as this is known when it is compiled
            if start + BLOCK_T >= T:
                squares += grad * grad
                grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)

    weight = ((tl.program_id(1).to(tl.int64) * kernel_places + k) * groups + group) * rows * columns
    store_tile(partial_ptr + weight, squares, o, c, rows, columns, ADD)


@triton.jit
def _divide(value, divisor, inverse):
    """``value // divisor`` for quotients below 2^22, by a product: a division takes longer than the rest of an address."""
    quotient = (value.to(tl.float32) * inverse).to(tl.int32)
    rest = value - quotient * divisor
    return tl.where(rest < 0, quotient - 1, tl.where(rest >= divisor, quotient + 1, quotient))


def contract_(
    total: Tensor,  # [O, C / groups, K0, K1, K2], float32
    output_grad: Tensor,  # [N, O, T]
    input: Tensor,  # [N, C, X0, X1, X2]
    output_size: Sequence[int],
    patches: Patches,
    groups: int,
    units: Arithmetic,
) -> None:
    """Add the squares of all samples' gradients."""
    split, unpadded = units == SPLIT_TF32, Patches().padding
    grads = output_grad[:, :, None, None, :]
    copy_grads = split or not _in_vectors(grads, units, channels_innermost=False)
    copy_input = split or max(patches.padding) > 0
    copy_input = copy_input or not _in_vectors(input, units, channels_innermost=not patches.are_places)
    bytes_each = packed_bytes(grads, unpadded, split) * copy_grads
    bytes_each += packed_bytes(input, patches.padding, split) * copy_input
    step = max(1, PACKED_BYTES // bytes_each) if bytes_each else len(input)
    for start in range(0, len(input), step):
        d, x = grads[start : start + step], input[start : start + step]
        d = packed(d, unpadded, split) if copy_grads else d[None]
        x = packed(x, patches.padding, split) if copy_input else x[None]
        _launch(total, d[:, :, :, 0, 0], x, output_size, patches, groups, units)


def _in_vectors(x: Tensor, units: Arithmetic, *, channels_innermost: bool) -> bool:  # [N, C, X0, X1, X2]
    """Whether rows of ``x`` lie in memory so that whole vectors of 16-bit values are read."""
    if units == VECTOR_UNITS:  # has no such rows
        return True
    sizes, strides = x.shape, x.stride()
    inner = 1 if strides[1] == 1 or channels_innermost else 4
    others = (stride for i, stride in enumerate(strides) if i != inner and sizes[i] > 1)
    return strides[inner] == 1 and all(stride % ALIGNED == 0 for stride in others) and x.data_ptr() % 16 == 0


def _launch(
    total: Tensor,  # [O, C / groups, K0, K1, K2], float32
    d: Tensor,  # [parts, N, O, T]
    x: Tensor,  # [parts, N, C, X0, X1, X2], with its padding
    output_size: Sequence[int],
    patches: Patches,
    groups: int,
    units: Arithmetic,
) -> None:
    samples, places, (_, Y1, Y2) = d.shape[1], d.shape[3], output_size
    rows, columns = total.shape[0] // groups, total.shape[1]
    kernel_places = math.prod(patches.kernel)
    split = units == SPLIT_TF32
    block = min(units.places, max(16, triton.next_power_of_2(places)))
    blocks = tiles(units, rows, columns, block)
    programs = blocks[0].count(rows, columns) * groups * kernel_places
    each, shares = share(samples, programs, merge_cost(units, places))
    # Tiles of one place of the kernel lie apart: a weight's elements would be written one by one.
    weight = total.flatten(1) if kernel_places == 1 else total.new_empty(kernel_places, *total.shape[:2])
    add = shares == 1 and kernel_places == 1
    partial = weight if shares == 1 else weight.new_empty(shares, *weight.shape)
    launch(
        contraction_kernel,
        blocks,
        (
            d, x, partial, samples, places, rows, columns, Y1, Y2, 1.0 / Y1, 1.0 / Y2, *patches.kernel, *patches.stride,
            *patches.dilation, *d.stride(), *x.stride(), groups, each,
        ),
        {
            "PRECISION": units.input_precision, "SPLIT": split, "PATCHES": not patches.are_places,
            "ONCE": places <= block, "ADD": add,
        },
        weight=(groups * kernel_places, rows, columns),
        shares=shares,
        places=places,
        samples=samples,
    )  # fmt: skip
    if not add:
        summed = partial if shares == 1 else partial.sum(dim=0)
        total += summed.movedim(0, 2).view_as(total) if kernel_places > 1 else summed.view_as(total)


def tiles(units: Arithmetic, rows: int, columns: int, places: int) -> tuple[Tile, ...]:
    """Tiles for a ``[rows, columns]`` weight, the one to use unmeasured first; measured on an H200.

    A program holds two float32 tiles in registers, the sample's gradient and the running sum of squares, and of split
    operands a third: fewer elements a thread then. Small tiles leave several programs on a multiprocessor, of which
    one adds squares while others multiply.
    """
    split = units == SPLIT_TF32
    sizes = (
        [(64, 64, 4), (128, 64, 8), (128, 128, 8)]
        if split
        else [(128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 128, 8)]
    )
    most_rows, most_columns = (max(16, triton.next_power_of_2(size)) for size in (rows, columns))
    found: dict[tuple[int, int], Tile] = {}
    for tile_rows, tile_columns, warps in sizes:
        size = min(tile_rows, most_rows), min(tile_columns, most_columns)
        area = size[0] * size[1]
        fewest = 4 if area > 1024 else 2
        found.setdefault(size, Tile(*size, places, warps if size == (tile_rows, tile_columns) else fewest))
    return tuple(found.values())
