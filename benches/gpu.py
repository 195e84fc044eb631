"""GPU benches: each kernel beside what the device can do, in one run, as a ratio.

    python benches/gpu.py --results DIR

Times are medians over interleaved rounds, taken with CUDA events around replays of a CUDA graph, so that neither the
launch overhead of Python nor a drift of the clocks enters a ratio. What is called from Python is timed so as well.
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import triton

import limpet
from gpu_report import Cell, Report, Table
from gpu_timing import Run, compiled_milliseconds, copy_bandwidth, kernel_launches, matrix_rate, milliseconds
from limpet import ops, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from gpu_fisher import contraction, whole_models
from op_cases import GPT2_SHAPES, RESNET18_SHAPES

Planned = tuple[Table, list[Callable[[], list[Cell]]]]  # a table, and what makes each of its rows

MODELS = {"one tensor, 50M": [(50_000_000,)], "GPT-2": GPT2_SHAPES, "ResNet-18": RESNET18_SHAPES}


# --- quadratic -------------------------------------------------------------------------------------------------------


def quadratic_row(name: str, shapes: list[tuple[int, ...]], bandwidth: float) -> list[Cell]:
    """One model: ours by graph and called directly, and the usual loop over parameters with autograd."""
    params = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
    anchors, weights, grads = (
        [f(p.detach()) for p in params] for f in (torch.randn_like, torch.rand_like, torch.zeros_like)
    )
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad

    def ours() -> object:
        return ops.add_quadratic_penalty_grad_(params, anchors, weights, 1.0)

    def loop() -> None:
        penalty = sum((w * (p - a).square()).sum() for p, a, w in zip(params, anchors, weights, strict=True))
        torch.autograd.backward(penalty)

    ours_ms = milliseconds({"ours": ours})["ours"]
    direct = milliseconds({"ours": ours, "loop": loop}, graph_calls=0)
    compiled_ms = None
    if len(params) == 1:  # the others take minutes to compile
        lists = ([p.detach() for p in params], grads, anchors, weights)
        compiled_ms = compiled_milliseconds(reference.add_quadratic_penalty_grad_, *lists, 1.0)
    numel = sum(p.numel() for p in params)
    share = 20 * numel / (ours_ms * 1e-3) / bandwidth
    launches = kernel_launches(ours)
    return [name, len(params), numel, ours_ms, share, launches, direct["ours"], direct["loop"], compiled_ms]


def quadratic(bandwidth: float) -> Planned:
    """Penalty and gradient in one pass, as a share of the measured copy bandwidth."""
    columns = ["model", "tensors", "parameters", "ms", "share of copy bandwidth", "launches"]
    columns += ["called from Python ms", "Python loop ms", "torch.compile(reference) ms"]
    table = Table("Quadratic penalty and gradient, float32, 20 bytes a parameter", columns)
    return table, [partial(quadratic_row, name, shapes, bandwidth) for name, shapes in MODELS.items()]


# --- path integral ---------------------------------------------------------------------------------------------------


def path_integral_row(name: str, shapes: list[tuple[int, ...]], bandwidth: float) -> list[Cell]:
    """One model: ours by graph and called directly, and torch's fused AdamW with and without it."""
    params = [torch.randn(shape, device="cuda").requires_grad_() for shape in shapes]
    previous, grads, integrals = (
        [f(p.detach()) for p in params] for f in (torch.clone, torch.randn_like, torch.zeros_like)
    )
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    step = torch.optim.AdamW(params, fused=True, capturable=True).step

    def ours() -> object:
        return ops.path_integral_update_(integrals, previous, params, grads)

    def step_and_ours() -> None:
        step()
        ours()

    def step_and_foreach() -> None:
        before = [p.detach().clone() for p in params]
        step()
        moved = torch._foreach_sub([p.detach() for p in params], before)
        torch._foreach_addcmul_(integrals, grads, moved, value=-1.0)

    times = milliseconds({"ours": ours, "step": step, "both": step_and_ours, "foreach": step_and_foreach})
    direct = milliseconds({"ours": ours}, graph_calls=0)["ours"]
    numel = sum(p.numel() for p in params)
    share = 24 * numel / (times["ours"] * 1e-3) / bandwidth
    ratios = [times[name] / times["step"] for name in ("both", "foreach")]
    return [name, len(params), numel, times["ours"], share, kernel_launches(ours), direct, times["step"], *ratios]


def path_integral(bandwidth: float) -> Planned:
    """The path integral's pass as a share of the measured copy bandwidth, and beside the step it follows."""
    columns = ["model", "tensors", "parameters", "ms", "share of copy bandwidth", "launches", "called from Python ms"]
    columns += ["AdamW(fused) ms", "AdamW and ours / AdamW", "AdamW and foreach / AdamW"]
    table = Table("Path integral, float32, 24 bytes a parameter", columns)
    return table, [partial(path_integral_row, name, shapes, bandwidth) for name, shapes in MODELS.items()]


# --- gated lateral ---------------------------------------------------------------------------------------------------


def gated_lateral_row(batch: int, width: int, dtype: torch.dtype, deadline: float) -> list[Cell]:
    """One shape, forward and backward: ours, its three products, eager, and eager compiled."""
    x, h, grad = (torch.randn(batch, width, device="cuda").to(dtype) for _ in range(3))
    weight = (torch.randn(width, width, device="cuda") / width**0.5).to(dtype)
    bias = torch.randn(width, device="cuda").to(dtype)
    tensors = [t.clone().requires_grad_() for t in (x, h, weight, bias)]

    def eager(x: torch.Tensor, h: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.lerp(h, x, torch.sigmoid(torch.nn.functional.linear(h, weight, bias)))

    def both_ways(function: Callable[..., torch.Tensor]) -> Run:
        return lambda: torch.autograd.grad(function(*tensors), tensors, grad)

    times = milliseconds(
        {
            "ours": both_ways(ops.gated_lateral),
            "products": lambda: (h @ weight.T, grad @ weight, grad.T @ h),
            "eager": both_ways(eager),
        }
    )
    compiled_ms = None
    if time.monotonic() < deadline:
        compiled = torch.compile(eager)
        try:
            compiled_ms = milliseconds({"compiled": both_ways(compiled)}, rounds=9)["compiled"]
        except Exception as error:
            print(f"torch.compile of the gated lateral: {error}", file=sys.stderr)
    ratio = times["ours"] / times["products"]
    target = 1.15 if width >= 4096 else 1.5
    row = [f"{batch} x {width}", times["ours"], times["products"], ratio, target, times["eager"], compiled_ms]
    return [str(dtype)[6:], *row]


def gated_lateral(deadline: float) -> Planned:
    """Forward and backward beside the three bare products of the same shape and precision."""
    columns = ["dtype", "B x H", "ms", "products ms", "ratio", "at most", "eager (lerp) ms", "torch.compile(eager) ms"]
    shapes = [(4096, 4096), (4096, 512)]
    dtypes = (torch.bfloat16, torch.float32)
    table = Table("Gated lateral, forward and backward, beside its three products", columns)
    return table, [partial(gated_lateral_row, *shape, dtype, deadline) for dtype in dtypes for shape in shapes]


# --- the run ---------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Cell]:
    """Device, versions and commit."""
    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": properties.total_memory / 2**30,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "limpet": limpet.__version__,
        "commit": commit or None,
    }


def main() -> None:
    """Run every bench and write ``gpu.json`` and ``gpu.md``, anew after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--seconds", type=float, default=150.0, help="start no compilation of a reference after these")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device")
    deadline = time.monotonic() + arguments.seconds
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    report = Report("GPU benches", machine())
    bandwidth = copy_bandwidth()
    rates = {dtype: matrix_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    ceilings = Table("Ceilings, measured in this run", ["what", "rate"])
    ceilings.rows.append(["device-to-device copy, TB/s read plus written", bandwidth / 1e12])
    ceilings.rows += [[f"matrix product, {dtype}, TFLOP/s", rate / 1e12] for dtype, rate in rates.items()]
    report.tables.append(ceilings)

    planned = [whole_models(), *(contraction(dtype, rate, deadline) for dtype, rate in rates.items())]
    planned += [gated_lateral(deadline), quadratic(bandwidth), path_integral(bandwidth)]
    failures = 0
    for table, rows in planned:
        report.tables.append(table)
        for row in rows:
            try:
                table.rows.append(row())
            except Exception:  # the other rows are still worth having
                failures += 1
                traceback.print_exc()
            torch.cuda.empty_cache()
            report.write(arguments.results, "gpu")
    print(report.markdown())
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
