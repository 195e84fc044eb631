"""The contraction of the Fisher family: per-sample gradients of linear and convolution weights, squared and added."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from limpet.triton_kernels._packing import ALIGNED, VECTOR_BYTES, Patches, packed, packed_bytes
from limpet.triton_kernels._tiles import (
    SPLIT_TF32,
    VECTOR_UNITS,
    Arithmetic,
    Tile,
    cdiv,
    has_copy_engine,
    merge_cost,
    next_power_of_2,
    share,
    store_tile,
)
from limpet.triton_kernels._tuning import launch

# Copies of operands take about this much memory at a time: samples beyond it have their turn later.
PACKED_BYTES = 2**28


@triton.jit
def contraction_kernel(
    d_ptr,  # [parts, N, groups rows, T]
    x_ptr,  # [parts, N, groups columns, U, T and what the next places of the kernel see]
    partial_ptr,  # [shares, K, groups rows, columns], contiguous; [groups rows, columns], added to, if ADD
    N,
    T,
    rows,  # of a group
    columns,  # channels of a group
    K,  # places of the kernel
    U,  # of them in copies of their own
    shift,  # between those that share a copy; a multiple of VECTOR
    d_stride_part,
    d_stride_n,
    d_stride_o,
    d_stride_t,
    x_stride_part,
    x_stride_n,
    x_stride_c,
    x_stride_u,
    x_stride_t,
    groups,
    samples_each,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,  # float32 in two parts
    ONCE: tl.constexpr,  # T <= BLOCK_T
    ADD: tl.constexpr,
    BULK: tl.constexpr,  # read by the copy engine: without groups, channels innermost, one copy
    VECTOR: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """``partial[s,k,o,c] = sum_{n in share s} (sum_t d[n,o,t] x[n,c,k,t])^2``, one place k of the kernel a program.

    The gradient of a sample exists only as a tile in registers: it is squared and added when its last place
    is in. Samples and places are one loop, so that the loads of the next sample overlap the products of this one.
    """
    tiles_i, tiles_o = tl.cdiv(columns, BLOCK_I), tl.cdiv(rows, BLOCK_O)
    k = tl.program_id(0) % K
    tile = tl.program_id(0) // K
    group = tile // (tiles_i * tiles_o)
    o_first, c_first = tile // tiles_i % tiles_o * BLOCK_O, tile % tiles_i * BLOCK_I
    o, c = o_first + tl.arange(0, BLOCK_O), c_first + tl.arange(0, BLOCK_I)  # [BLOCK_O], [BLOCK_I]
    places = tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * samples_each
    samples = tl.minimum(samples_each, N - first)

    # Offsets are 64 bits wide: an index times a stride may pass 2**31.
    d_row = d_ptr + (group * rows + o).to(tl.int64) * d_stride_o
    x_column = x_ptr + (group * columns + c).to(tl.int64) * x_stride_c + (k % U).to(tl.int64) * x_stride_u
    x_column += tl.multiple_of(k // U * shift, VECTOR)
    d_tile = d_row[:, None] + places.to(tl.int64)[None, :] * d_stride_t
    x_tile = x_column[:, None] + places.to(tl.int64)[None, :] * x_stride_t
    o_in, c_in = (o < rows)[:, None], (c < columns)[:, None]
    if BULK:
        d_block = tl.make_tensor_descriptor(d_ptr, [N, T, rows], [d_stride_n, d_stride_t, 1], [1, BLOCK_T, BLOCK_O])
        x_block = tl.make_tensor_descriptor(x_ptr, [N, T, columns], [x_stride_n, x_stride_t, 1], [1, BLOCK_T, BLOCK_I])

    grad = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    squares = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    blocks = 1 if ONCE else tl.cdiv(T, BLOCK_T)
    for step in range(samples * blocks):
        n = (first + step // blocks).to(tl.int64)
        start = step % blocks * BLOCK_T
        t_in = (start + places < T)[None, :]
        at = start.to(tl.int64)
        d_at, x_at = n * d_stride_n + at * d_stride_t, n * x_stride_n + at * x_stride_t
        if BULK:
            d = d_block.load([first + step // blocks, start, o_first]).reshape(BLOCK_T, BLOCK_O).trans()
            x = x_block.load([first + step // blocks, start, c_first]).reshape(BLOCK_T, BLOCK_I).trans()
        else:
            d = tl.load(d_tile + d_at, mask=o_in & t_in, other=0.0)  # [BLOCK_O, BLOCK_T]
            x = tl.load(x_tile + x_at, mask=c_in & t_in, other=0.0)  # [BLOCK_I, BLOCK_T]
        if SPLIT:
            # Matrix units cut off bits when they add: a block's products are summed apart, the small ones first, and
            # blocks are added by the vector units. The product of two low parts is below float32's last bit.
            low_d = tl.load(d_tile + (d_at + d_stride_part), mask=o_in & t_in, other=0.0)
            low_x = tl.load(x_tile + (x_at + x_stride_part), mask=c_in & t_in, other=0.0)
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

    weight = ((tl.program_id(1).to(tl.int64) * K + k) * groups + group) * rows * columns
    store_tile(partial_ptr + weight, squares, o, c, rows, columns, ADD)


def contract_(
    total: Tensor,  # [O, C / groups, K], float32, contiguous
    output_grad: Tensor,  # [N, O, T]
    input: Tensor,  # [N, C, X0, X1, X2]
    patches: Patches,
    groups: int,
    units: Arithmetic,
) -> None:
    """Add the squares of all samples' gradients."""
    split = units == SPLIT_TF32
    grads, places = output_grad[:, :, None, None, :], Patches((1, 1, output_grad.shape[2]))
    copy_grads = split or not _in_vectors(output_grad, units)
    copy_input = split or not (patches.are_places and _in_vectors(input.flatten(2), units))
    bytes_each = packed_bytes(grads, places, split) * copy_grads + packed_bytes(input, patches, split) * copy_input
    turns = cdiv(bytes_each * len(input), PACKED_BYTES) or 1
    step = cdiv(len(input), turns)
    for start in range(0, len(input), step):
        d, x = grads[start : start + step], input[start : start + step]
        d = packed(d, places, split)[:, :, :, 0] if copy_grads else d[None, :, :, 0, 0]
        x = packed(x, patches, split) if copy_input else x.flatten(2)[None, :, :, None]
        _launch(total, d, x, patches, groups, units)


def _in_vectors(x: Tensor, units: Arithmetic) -> bool:  # [N, C, T]
    """Whether rows of ``x`` lie in memory so that whole vectors of 16-bit values are read."""
    if units == VECTOR_UNITS:  # have none
        return True
    inner = 1 if x.stride(1) == 1 else 2
    strides = [stride for i, stride in enumerate(x.stride()) if i != inner and x.shape[i] > 1]
    return x.stride(inner) == 1 and all(stride % ALIGNED == 0 for stride in strides) and x.data_ptr() % 16 == 0


def _in_bulk(x: Tensor) -> bool:  # [1, N, C, T] or [1, N, C, 1, T]
    """Whether the copy engine of a GPU of compute capability 9 on can read ``x``: 16-bit values, channels innermost."""
    strides = x.stride(1), x.stride(-1)
    return (
        x.element_size() == 2
        and x.stride(2) == 1
        and all(stride > 0 and stride % (VECTOR_BYTES // 2) == 0 for stride in strides)
        and x.data_ptr() % VECTOR_BYTES == 0
        and has_copy_engine(x.device)
    )


def _launch(
    total: Tensor,  # [O, C / groups, K], float32, contiguous
    d: Tensor,  # [parts, N, O, T]
    x: Tensor,  # [parts, N, C, U, P]
    patches: Patches,
    groups: int,
    units: Arithmetic,
) -> None:
    samples, places = d.shape[1], d.shape[3]
    rows, columns, K = total.shape[0] // groups, total.shape[1], total.shape[2]
    _, shift = patches.shifted(x.element_size())
    block = min(units.places, max(16, next_power_of_2(places)))
    blocks = tiles(units, rows, columns, block)
    programs = blocks[0].count(rows, columns) * groups * K
    each, shares = share(samples, programs, merge_cost(units, places))
    # The tiles of a place of the kernel lie together: a weight's elements would be written one by one.
    partial = total.flatten(1) if K == 1 else total.new_empty(K, *total.shape[:2])
    add = shares == 1 and K == 1
    partial = partial if shares == 1 else partial.new_empty(shares, *partial.shape)
    launch(
        contraction_kernel,
        blocks,
        (d, x, partial),
        (samples, places, rows, columns, K, x.shape[3], shift, *d.stride(), *x.stride(), groups, each),
        {
            "PRECISION": units.input_precision, "SPLIT": units == SPLIT_TF32, "ONCE": places <= block, "ADD": add,
            "BULK": K == groups == 1 and _in_bulk(d) and _in_bulk(x), "VECTOR": VECTOR_BYTES // x.element_size(),
        },
        weight=(groups * K, rows, columns),
        shares=shares,
        places=places,
        samples=samples,
    )  # fmt: skip
    if not add:
        summed = partial if shares == 1 else partial.sum(dim=0)
        total += summed[:, :, None] if K == 1 else summed.movedim(0, 2)


@functools.lru_cache(maxsize=4096)
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
    most_rows, most_columns = (max(16, next_power_of_2(size)) for size in (rows, columns))
    found: dict[tuple[int, int], Tile] = {}
    for tile_rows, tile_columns, warps in sizes:
        size = min(tile_rows, most_rows), min(tile_columns, most_columns)
        area = size[0] * size[1]
        fewest = 4 if area > 1024 else 2
        found.setdefault(size, Tile(*size, places, warps if size == (tile_rows, tile_columns) else fewest))
    return tuple(found.values())
