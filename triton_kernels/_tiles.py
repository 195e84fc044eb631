"""How the kernels cut their work: tiles, programs that share the samples, and how their sums come together.

A table instead of autotuning: the choice follows from shapes and dtypes alone, so the same inputs are summed
in the same order in every process and on every run, and the result is the same bit for bit.
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

MATRIX_DTYPES = (torch.bfloat16, torch.float16)

# A product and a sum are one instruction, whatever the default of the Triton at hand.
OPTIONS = {"enable_fp_fusion": True}


class Tile(NamedTuple):
    """The part of a weight one program owns, and the places it reads at a time."""

    rows: int
    columns: int
    places: int
    num_warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options: three blocks of places in flight."""
        return {"num_warps": self.num_warps, "num_stages": 3, **OPTIONS}


def tile(dtype: torch.dtype, rows: int, columns: int) -> Tile:
    """The tile for a ``[rows, columns]`` weight and inputs of ``dtype``.

    A program holds two float32 tiles in registers, the sample's gradient and the running sum of squares: at
    128 x 64 over 8 warps that leaves the operands room, and two programs share a multiprocessor. Matrix units
    (16-bit inputs) take twice the places at a time. Weights smaller than the tile get the next power of two.
    """
    places = 32 if dtype in MATRIX_DTYPES else 16
    block_rows = min(128, max(16, triton.next_power_of_2(rows)))
    block_columns = min(64, max(16, triton.next_power_of_2(columns)))
    area = block_rows * block_columns
    return Tile(block_rows, block_columns, places, 8 if area > 4096 else 4 if area > 1024 else 2)


@functools.lru_cache(maxsize=4096)
def share(samples: int, programs: int, merge: float) -> tuple[int, int]:
    """Split samples over programs: (samples for each, number of shares), where one share takes ``programs``.

    The least of a model of the time, in units of one program's work on one sample: what the busiest multiprocessor
    does (one program alone takes as long as two, which hide each other's latency), and ``merge`` for each program's
    partial sum, written and read again, spread over all. Fewer shares where it is equal.
    """

    def cost(shares: int) -> float:
        busiest = max(2, triton.cdiv(programs * shares, PROCESSORS))
        return busiest * triton.cdiv(samples, shares) + (merge * shares * programs / PROCESSORS if shares > 1 else 0.0)

    shares = min(range(1, max(1, min(samples, 4 * PROCESSORS // programs)) + 1), key=cost)
    each = triton.cdiv(samples, shares)
    return each, triton.cdiv(samples, each)


def merge_cost(dtype: torch.dtype, places: int) -> float:
    """What a partial tile costs ``share``, in products over ``places``: 12 bytes an element, against 2 operations each.

    About 64 places take as long on vector units, 512 on matrix units (from the rates of datasheets, not tuned).
    """
    return (512 if dtype in MATRIX_DTYPES else 64) / places


def partial_sums(total: Tensor, shares: int) -> Tensor:  # [*] -> [*] or [shares, *]
    """Where programs write: ``total`` itself for one share, which adds to it, else one buffer each."""
    return total if shares == 1 else total.new_empty((shares, *total.shape))


def add_partial_sums_(total: Tensor, partial: Tensor) -> None:  # [*], [*] or [shares, *]
    """Add the shares, in order, unless ``total`` was written directly."""
    if partial is not total:
        total += partial.sum(dim=0)


@triton.jit
def store_tile(
    out_ptr,  # [shares, rows, columns], contiguous; of this program's weight
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
