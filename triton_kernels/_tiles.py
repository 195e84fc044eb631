"""How the kernels multiply and cut their work: arithmetic, tiles, programs that share the samples, and their sums.

What decides in which order an element is summed (the places read at a time, the shares of the samples) follows from
shapes, dtypes and the kind of device alone; :mod:`._tuning` measures only tiles that leave it as it is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Multiprocessors of a large GPU; a constant, so that how the work is split does not depend on the device at hand.
PROCESSORS = 132

# A product and a sum are one instruction, whatever the default of the Triton at hand.
OPTIONS = {"enable_fp_fusion": True}


def cdiv(a: int, b: int) -> int:
    """``a / b``, rounded up; Triton's own takes microseconds."""
    return -(-a // b)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not below ``size``."""
    return 1 << max(0, size - 1).bit_length()


class Arithmetic(NamedTuple):
    """How a kernel multiplies."""

    input_precision: str  # tl.dot's
    places: int  # read at a time
    merge: int  # places whose products take as long as a partial sum, by the rates of datasheets: see merge_cost


VECTOR_UNITS = Arithmetic("ieee", 16, 64)
# float32 on matrix units: each factor is the sum of two tf32 values, of whose products three are taken. The error is
# float32's (the fourth product is below its last bit), the rate a third of tf32's and above that of the vector units.
SPLIT_TF32 = Arithmetic("tf32x3", 32, 160)
MATRIX_UNITS = Arithmetic("ieee", 64, 512)


def arithmetic(dtype: torch.dtype, device: torch.device) -> Arithmetic:
    """How inputs of ``dtype`` are multiplied on ``device``."""
    if dtype != torch.float32:
        return MATRIX_UNITS
    return SPLIT_TF32 if _has_capability(device, 8) else VECTOR_UNITS


@functools.cache
def _has_capability(device: torch.device, least: int) -> bool:
    """Whether the device is an NVIDIA GPU of that compute capability or more (the CUDA device may be AMD's, too)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (least, 0)


def has_copy_engine(device: torch.device) -> bool:
    """Whether blocks of a tensor are copied to shared memory by one instruction."""
    return _has_capability(device, 9)


class Tile(NamedTuple):
    """The part of a weight one program owns, and the places it reads at a time."""

    rows: int
    columns: int
    places: int
    num_warps: int

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants."""
        return {"BLOCK_O": self.rows, "BLOCK_I": self.columns, "BLOCK_T": self.places}

    @property
    def options(self) -> dict[str, int]:
        """Triton's: three blocks of places in flight."""
        return {"num_warps": self.num_warps, "num_stages": 3}

    def count(self, rows: int, columns: int) -> int:
        """Tiles of a ``[rows, columns]`` weight."""
        return cdiv(rows, self.rows) * cdiv(columns, self.columns)


def tiles(units: Arithmetic, rows: int, columns: int) -> tuple[Tile, ...]:
    """The tiles for a ``[rows, columns]`` weight, the one to use unmeasured first.

    A program holds two float32 tiles in registers, the sample's gradient and the running sum of squares: at
    128 x 64 over 8 warps that leaves the operands room, and two programs share a multiprocessor. Weights smaller than
    the tile get the next power of two. Two more come into question for large weights: smaller ones, of which
    more are in flight, and ones twice as large, which read one operand half as often but leave tf32's parts no room.
    """
    block_rows = min(128, max(16, next_power_of_2(rows)))
    block_columns = min(64, max(16, next_power_of_2(columns)))
    area = block_rows * block_columns
    first = Tile(block_rows, block_columns, units.places, 8 if area > 4096 else 4 if area > 1024 else 2)
    if area < 128 * 64:
        return (first,)
    smaller, larger = Tile(64, 64, units.places, 4), Tile(128, 128, units.places, 8)
    return (first, smaller) if units == SPLIT_TF32 else (first, smaller, larger)


@functools.lru_cache(maxsize=4096)
def share(samples: int, programs: int, merge: float) -> tuple[int, int]:
    """Split samples over programs: (samples for each, number of shares), where one share takes ``programs``.

    The least of a model of the time, in units of one program's work on one sample: what the busiest multiprocessor
    does (one program alone takes as long as two, which hide each other's latency), and ``merge`` for each program's
    partial sum, written and read again, spread over all. Fewer shares where it is equal.
    """

    def cost(shares: int) -> float:
        busiest = max(2, cdiv(programs * shares, PROCESSORS))
        return busiest * cdiv(samples, shares) + (merge * shares * programs / PROCESSORS if shares > 1 else 0.0)

    shares = min(range(1, max(1, min(samples, 8 * PROCESSORS // programs)) + 1), key=cost)
    each = cdiv(samples, shares)
    return each, cdiv(samples, each)


def merge_cost(units: Arithmetic, places: int) -> float:
    """What a partial tile costs ``share``, in products over ``places``: 12 bytes an element, 2 operations a product."""
    return units.merge / places


def partial_sums(total: Tensor, shares: int) -> Tensor:  # [*] -> [*] or [shares, *]
    """Where programs write: ``total`` itself for one share, which adds to it, else one buffer each."""
    return total if shares == 1 else total.new_empty((shares, *total.shape))


def add_partial_sums_(total: Tensor, partial: Tensor) -> None:  # [*], [*] or [shares, *]
    """Add the shares, in order, unless ``total`` was written directly."""
    if partial is not total:
        total += partial.sum(dim=0)


@triton.jit
def store_tile(
    out_ptr,  # [rows, columns], contiguous; of this program's weight and share
    values,  # [BLOCK_R, BLOCK_C]
    r,  # [BLOCK_R]
    c,  # [BLOCK_C]
    rows,
    columns,
    ADD: tl.constexpr,
):
    """Write a tile, or add it to what is there when one share has all samples."""
    out = out_ptr + r.to(tl.int64)[:, None] * columns + c[None, :]
    inside = (r < rows)[:, None] & (c < columns)[None, :]
    if ADD:
        values += tl.load(out, mask=inside, other=0.0)
    tl.store(out, values, mask=inside)
