"""The Triton kernels compiled ahead of time, as their launchers would launch them, elsewhere."""

import importlib.util
import inspect
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
import triton.backends.nvidia
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from limpet.triton_kernels import (
    _contraction,
    _packing,
    _tiles,
    fisher,
    fisher_channel,
    fisher_conv,
    fisher_embedding,
    gated_lateral,
    path_integral,
    reservoir,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def linear(dtype: torch.dtype) -> None:
    d, a = torch.empty(32, 16, 512, dtype=dtype), torch.empty(32, 16, 4608, dtype=dtype)
    fisher.sum_grad_squared_linear_(torch.empty(512, 4608), d, a)


def linear_shared(dtype: torch.dtype) -> None:
    d, a = torch.empty(32, 1001, 63, dtype=dtype), torch.empty(32, 1001, 575, dtype=dtype)
    fisher.sum_grad_squared_linear_(torch.empty(63, 575), d, a)


def linear_packed(dtype: torch.dtype) -> None:
    x = torch.empty(8, 129, 1, 1, 50257, dtype=dtype).transpose(1, 4)
    _packing.packed(x, _packing.Patches((1, 1, 129)), dtype == torch.float32)


def linear_single(dtype: torch.dtype) -> None:
    d, a = torch.empty(128, 1, 1024, dtype=dtype), torch.empty(128, 1, 784, dtype=dtype)
    fisher.sum_grad_squared_linear_(torch.empty(1024, 784), d, a)


def conv(dtype: torch.dtype) -> None:
    d, x = torch.empty(64, 256, 8, 8, dtype=dtype), torch.empty(64, 256, 8, 8, dtype=dtype)
    fisher_conv.sum_grad_squared_conv_(torch.empty(256, 256, 3, 3), d, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)


def conv_few_channels(dtype: torch.dtype) -> None:
    d, x = torch.empty(64, 64, 32, 32, dtype=dtype), torch.empty(64, 3, 32, 32, dtype=dtype)
    fisher_conv.sum_grad_squared_conv_(torch.empty(64, 3, 3, 3), d, x, [3, 3], [1, 1], [1, 1], [1, 1], 1)


def conv_depthwise(dtype: torch.dtype) -> None:
    d, x = torch.empty(8, 96, 30, dtype=dtype), torch.empty(8, 96, 32, dtype=dtype)
    fisher_conv.sum_grad_squared_conv_(torch.empty(96, 1, 3), d, x, [3], [1], [0], [1], 96)


def bias(dtype: torch.dtype) -> None:
    fisher_channel.sum_grad_squared_bias_(torch.empty(64), torch.empty(64, 1, 64, 1024, dtype=dtype))


def scale(dtype: torch.dtype) -> None:
    d = torch.empty(32, 128, 768, 1, dtype=dtype)
    fisher_channel.sum_grad_squared_scale_(torch.empty(768), d, d)


def scale_centred(dtype: torch.dtype) -> None:
    d = torch.empty(64, 1, 128, 256, dtype=dtype)
    fisher_channel.sum_grad_squared_scale_(torch.empty(128), d, d, torch.empty(128))


def norm(dtype: torch.dtype) -> None:
    d, mean = torch.empty(8, 1024, 768, dtype=dtype), torch.empty(8, 1024)
    fisher_channel.sum_grad_squared_norm_(torch.empty(768), torch.empty(768), d, d, mean, mean)


def embedding(dtype: torch.dtype) -> None:
    d, indices = torch.empty(8, 128, 768, dtype=dtype), torch.zeros(8, 128, dtype=torch.int64)
    fisher_embedding.sum_grad_squared_embedding_(torch.empty(100, 768), d, indices, -1)


def path(dtype: torch.dtype) -> None:
    theta = [torch.empty(1000, 768, dtype=dtype)]
    path_integral.path_integral_update_([torch.empty(1000, 768)], theta, theta, theta, [], [], 0.0)


def path_without_penalty(dtype: torch.dtype) -> None:
    theta, narrow = [torch.empty(1001, dtype=dtype)], [torch.empty(1001, dtype=torch.bfloat16)]
    path_integral.path_integral_update_([torch.empty(1001)], theta, theta, theta, narrow, narrow, 1.0)


def reservoir_slots(_: torch.dtype) -> None:
    reservoir.reservoir_slots_(torch.empty(4096, dtype=torch.int64), 2**40, 10_000, 2**62)


def reservoir_decide(_: torch.dtype) -> None:
    numbers = torch.empty(4096, dtype=torch.int64)
    reservoir.decide_kernel[(4,)](
        numbers, numbers, numbers, 4096, 10_000, 2**62, BLOCK=reservoir.BLOCK, **_tiles.OPTIONS
    )


def reservoir_copy(_: torch.dtype) -> None:
    rows, numbers = torch.empty(100, 3136, dtype=torch.uint8), torch.empty(4096, dtype=torch.int64)
    reservoir.copy_kernel[(4,)](rows, rows, numbers, numbers, numbers, 3136, BLOCK_BYTES=4096, **_tiles.OPTIONS)


def sample_targets(_: torch.dtype) -> None:
    sample = torch.empty(4096, dtype=torch.int64)
    reservoir.targets_kernel[(4,)](sample, 2**40, 4096, 2**62, 2**33, BLOCK=reservoir.BLOCK, **_tiles.OPTIONS)


def sample_follow(_: torch.dtype) -> None:
    sample = torch.empty(4096, dtype=torch.int64)
    reservoir.follow_kernel[(32,)](sample, sample, 4096, BLOCK=128, **_tiles.OPTIONS)


def gather(_: torch.dtype) -> None:
    index = torch.empty(4096, dtype=torch.int64)
    reservoir.gather_rows_([torch.empty(4096, 784)], [torch.empty(10_000, 784)], index)


def gated(dtype: torch.dtype) -> None:
    x, weight = torch.empty(4096, 4096, dtype=dtype), torch.empty(4096, 4096, dtype=dtype)
    gated_lateral.gated_lateral(x, x, weight, weight[0], -1, True)


def gated_channels(dtype: torch.dtype) -> None:
    x, weight = torch.empty(63, 65, 7, 7, dtype=dtype), torch.empty(65, 65, dtype=dtype)
    gated_lateral.gated_lateral(x, x, weight, None, 1, False)


def gated_backward(dtype: torch.dtype) -> None:
    x, weight = torch.empty(512, 512, dtype=dtype), torch.empty(512, 512, dtype=dtype)
    gated_lateral.gated_lateral_backward(x, x, x, weight, weight[0], x, -1, [True, False, False, True])


LAUNCHES = (linear, linear_shared, linear_packed, linear_single, conv, conv_few_channels, conv_depthwise)
LAUNCHES += (bias, scale, scale_centred, norm, embedding)
LAUNCHES += (path, path_without_penalty, gated, gated_channels, gated_backward)
RESERVOIR = (reservoir_slots, reservoir_decide, reservoir_copy, sample_targets, sample_follow, gather)


def arithmetic(gpu: GPUTarget, dtype: torch.dtype) -> _tiles.Arithmetic:
    """What the launchers would choose on the device."""
    if dtype != torch.float32:
        return _tiles.MATRIX_UNITS
    return _tiles.SPLIT_TF32 if gpu.backend == "cuda" else _tiles.VECTOR_UNITS


@pytest.fixture
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[[Callable[[torch.dtype], None], torch.dtype], Any]]:
    """Run a launcher, but compile its kernel for the parameter's target instead of launching it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels: list[Any] = []

    def run(kernel: JITFunction, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        options = {k: kwargs.pop(k) for k in list(kwargs) if k not in kernel.arg_names}
        bound = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        signature, constants, attrs = {}, {}, {}
        for index, (name, value) in enumerate(bound.items()):  # as the just-in-time compiler specialises
            if isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif kernel.params[index].is_constexpr or value == 1:
                signature[name], constants[(index,)] = "constexpr", value
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if isinstance(value, Tensor) or (signature[name] in ("i32", "i64") and value % 16 == 0):
                attrs[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
        kernels.append(triton.compile(source, target=request.param, options=options))

    monkeypatch.setattr(JITFunction, "run", run)

    def launch(launcher: Callable[[torch.dtype], None], dtype: torch.dtype, choice: int) -> list[Any]:
        for module in (fisher, fisher_conv, gated_lateral):
            monkeypatch.setattr(module, "arithmetic", lambda dtype, _: arithmetic(request.param, dtype))
        bulk = request.param.backend == "cuda" and request.param.arch >= 90
        monkeypatch.setattr(_contraction, "has_copy_engine", lambda _: bulk)
        for module in (_contraction, fisher, fisher_conv, gated_lateral):
            monkeypatch.setattr(module, "tiles", lambda *args, tiles=module.tiles: tiles(*args)[choice:])
        launcher(dtype)
        return kernels

    return launch


def spilled_bytes(kernel: Any) -> int:
    """Bytes of registers that a thread keeps in memory for want of room."""
    if "amdgcn" in kernel.asm:
        return 4 * int(re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])[1])
    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    cubin = Path(kernel.metadata_group[f"{kernel.metadata.name}.cubin"])
    usage = subprocess.run([cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


def choices(gpu: GPUTarget, launcher: Callable[[torch.dtype], None], dtype: torch.dtype) -> range:
    """The tiles that would be measured: all of them on the two GPUs on which everything is compiled."""
    if launcher not in (linear, conv, gated) or gpu.arch not in (90, "gfx942"):
        return range(1)
    if launcher is gated:
        return range(len(_tiles.tiles(arithmetic(gpu, dtype), 512, 512)))
    return range(len(_contraction.tiles(arithmetic(gpu, dtype), 512, 512, 16)))


# Every launch for one GPU of each maker, the matrix kernels for the others too. Among the fast tests are the tiles that
# are tried first.
CASES = [
    pytest.param(
        *(gpu, launcher, dtype, choice),
        id=f"{name}-{launcher.__name__}-{str(dtype)[6:]}-{choice}",
        marks=[pytest.mark.slow] if choice else [],
    )
    for name, gpu in TARGETS.items()
    for launcher in (LAUNCHES if name in ("sm_90", "gfx942") else (linear, conv, gated))
    for dtype in (torch.float32, torch.bfloat16)
    for choice in choices(gpu, launcher, dtype)
]
CASES += [  # of bytes and integers
    pytest.param(TARGETS[name], launcher, torch.float32, 0, id=f"{name}-{launcher.__name__}")
    for name in ("sm_90", "gfx942")
    for launcher in RESERVOIR
]


@pytest.mark.parametrize(("compiled", "launcher", "dtype", "choice"), CASES, indirect=["compiled"])
def test_compiles_with_its_tiles_in_registers(
    compiled: Callable[..., Any], launcher: Callable[[torch.dtype], None], dtype: torch.dtype, choice: int
) -> None:
    *others, kernel = compiled(launcher, dtype, choice)  # others copy operands, or add within samples
    for each in (*others, kernel):
        assert spilled_bytes(each) <= 64  # a few addresses at most; a spilled tile would be kilobytes
    if launcher in (linear, linear_single, conv, gated) and "ptx" in kernel.asm:  # on matrix units, float32 as well
        assert ("cp.async.bulk.tensor" in kernel.asm["ptx"]) == (
            launcher is linear and dtype == torch.bfloat16 and ".target sm_80" not in kernel.asm["ptx"]
        )
        operands = r"bf16|kind::f16" if dtype == torch.bfloat16 and launcher is not linear_single else "tf32"
        assert re.search(rf"mma\.\S*({operands})\b", kernel.asm["ptx"])
