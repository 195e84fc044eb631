"""Launching a kernel again as it was compiled: what reaches the device, with a kernel that only writes down."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from limpet.triton_kernels import _tuning


class Kernel:
    """Takes ``x, n, FIRST, SECOND`` as a kernel of Triton's does, compiles at each call, and keeps all calls."""

    def __init__(self) -> None:
        self.arg_names = ["x", "n", "FIRST", "SECOND"]
        self.compilations: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*values: Any, num_warps: int, enable_fp_fusion: bool, **constants: Any) -> Any:
            self.compilations.append((grid, values, constants, num_warps))
            return Compiled(self)

        return call


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self._kernel.launches.append((grid, values))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(_tuning, "_compiled", {})
    return Kernel()


def launch(kernel: Any, x: torch.Tensor, n: int = 3, warps: int = 4) -> None:
    _tuning.run(kernel, (5, 2), (x,), (n,), {"SECOND": False, "FIRST": 16}, num_warps=warps)


def test_a_second_call_goes_past_the_compiler_with_the_same_values(kernel: Kernel) -> None:
    x, y = torch.zeros(8), torch.ones(9)
    launch(kernel, x)
    assert kernel.compilations == [((5, 2), (x, 3), {"SECOND": False, "FIRST": 16}, 4)]
    launch(kernel, y)
    assert len(kernel.compilations) == 1
    ((grid, (tensor, *values)),) = kernel.launches
    assert grid == (5, 2, 1)
    assert tensor is y
    assert values == [3, 16, False]  # in the kernel's order


def test_what_the_compiler_looks_at_is_compiled_again(kernel: Kernel) -> None:
    x = torch.zeros(8)
    for different in (x[1:], x.bfloat16()):
        launch(kernel, x)
        launch(kernel, different)
    launch(kernel, x, n=16)
    launch(kernel, x, warps=8)
    assert len(kernel.compilations) == 5
    assert len(kernel.launches) == 1


def test_what_is_remembered_is_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tuning, "MOST_COMPILED", 4)
    for n in range(20):
        launch(kernel, torch.zeros(1), n)
        assert len(_tuning._compiled) <= 4
