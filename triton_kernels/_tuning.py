"""Launching a kernel with its fastest tile: measured once per shape where the work is worth it, and remembered.

All tiles sum in the same order, so that what was measured, and whether anything was, does not show in the result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any

import torch
import triton
from torch import Tensor

from limpet.triton_kernels._tiles import OPTIONS, Tile, cdiv

# Products in a launch from which on measuring pays: below, a launch takes some ten microseconds with any tile.
WORTH_TUNING = 2**30

# Names of a kernel's arguments that make up a shape; how many samples there are does not matter.
KEYS = ("rows", "columns", "T", "Y0", "Y1", "Y2")

ALIGNMENT = 16  # bytes; what Triton asks of an address
MOST_COMPILED = 4096  # calls that are remembered

_fastest: dict[tuple[Any, ...], Tile] = {}
_compiled: dict[tuple[Any, ...], tuple[Any, list[str]]] = {}  # and the names of the constants, in order


def launch(
    kernel: Any,
    tiles: tuple[Tile, ...],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: Mapping[str, Any],
    *,
    weight: tuple[int, int, int],
    shares: int,
    places: int,
    samples: int,
    shape: tuple[int, ...] | None = None,
) -> None:
    """Run ``kernel`` on a grid of tiles by shares of the samples.

    Args:
        kernel: takes ``tensors``, ``numbers``, ``constants`` and the tile's BLOCK_O, BLOCK_I and BLOCK_T.
        tiles: the first is used where nothing was measured.
        tensors: the kernel's, by position; the first says where to launch.
        numbers: the kernel's, by position.
        constants: the kernel's, by name.
        weight: groups, and the rows and columns of one of them.
        shares: programs that share a tile's samples.
        places: of a sample.
        samples: of all shares.
        shape: what the fastest tile depends on, where that is not all of ``weight`` and ``places``.
    """
    groups, rows, columns = weight
    device = tensors[0].device
    shape = (*weight, places) if shape is None else shape
    key = (kernel, device, tensors[0].dtype, *shape, *constants.values())
    work = math.prod(weight) * places * samples

    def grid(blocks: Mapping[str, int]) -> tuple[int, int]:
        return groups * cdiv(rows, blocks["BLOCK_O"]) * cdiv(columns, blocks["BLOCK_I"]), shares

    def start() -> None:
        triton.set_allocator(lambda size, _align, _stream: torch.empty(size, dtype=torch.int8, device=device))
        if len(tiles) > 1 and key not in _fastest and work >= WORTH_TUNING and can_measure(device):
            tuner = _tuner(kernel, tiles)
            tuner[grid](*tensors, *numbers, **constants, **OPTIONS)
            _fastest[key] = next(tile for tile in tiles if tile.blocks == tuner.best_config.kwargs)
            return
        tile = _fastest.get(key, tiles[0])
        run(kernel, grid(tile.blocks), tensors, numbers, {**constants, **tile.blocks}, **tile.options)

    copy_context().run(start)  # a context of its own, where Triton gets the memory of its descriptors from torch


def run(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    numbers: Sequence[float],
    constants: Mapping[str, Any],
    **launched: int,
) -> None:
    """Run ``kernel``; at a second call with the same numbers, as Triton had compiled it for the first.

    Triton looks at each argument to find what it compiled, which takes as long as ten launches for a kernel of thirty.

    Args:
        kernel: takes ``tensors`` and ``numbers`` by position, ``constants`` by name, in this order.
        grid: programs, in one or two dimensions.
        tensors: the first says where to launch.
        numbers: integers and floats.
        constants: what the kernel is compiled for.
        launched: Triton's options.
    """
    addresses = [(tensor.dtype, tensor.data_ptr() % ALIGNMENT) for tensor in tensors]
    key = (kernel, tensors[0].device, *addresses, *numbers, *constants.values(), *launched.values())
    found = _compiled.get(key)
    if found is not None:
        compiled, names = found
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *map(constants.__getitem__, names))
        return
    compiled = kernel[grid](*tensors, *numbers, **constants, **launched, **OPTIONS)
    if len(_compiled) >= MOST_COMPILED:
        _compiled.clear()
    if compiled is not None:  # as it is in the interpreter
        _compiled[key] = compiled, kernel.arg_names[len(tensors) + len(numbers) :]


def can_measure(device: torch.device) -> bool:
    """Whether there is a device to wait for: not in the interpreter, and not while a CUDA graph is captured."""
    return device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@functools.cache
def _tuner(kernel: Any, tiles: tuple[Tile, ...]) -> Any:
    """Triton's tuner, which keeps what it found on disk."""
    configs = [triton.Config(tile.blocks, **tile.options) for tile in tiles]
    keys = [name for name in KEYS if name in kernel.arg_names]
    # A single share adds to the total: each trial starts from what was there.
    return triton.autotune(
        configs,
        key=keys,
        restore_value=["partial_ptr"],
        do_bench=lambda call, quantiles: milliseconds(call, quantiles),
        cache_results=True,
    )(kernel)


def milliseconds(call: Callable[[], None], quantiles: Sequence[float]) -> Sequence[float]:
    """A short trial: a model has tens of shapes, of which each is tried with every tile."""
    return triton.testing.do_bench(call, warmup=2, rep=10, quantiles=quantiles)  # type: ignore[no-any-return]
