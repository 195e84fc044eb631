"""GPU benches: each kernel beside what the device can do, in one run, as a ratio.

    python benches/gpu.py --results DIR

Times are medians over interleaved rounds, taken with CUDA events around replays of a CUDA graph, so that neither the
launch overhead of Python nor a drift of the clocks enters a ratio. What is called from Python is timed so as well.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

import limpet
from gpu_report import Cell, Report, Table
from limpet import ops, reference

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from cases import MLP, RESNET18, Case
from op_cases import GPT2_SHAPES, LINEAR_TIMED, RESNET18_SHAPES

Run = Callable[[], object]

MODELS = {"one tensor, 50M": [(50_000_000,)], "GPT-2": GPT2_SHAPES, "ResNet-18": RESNET18_SHAPES}


def milliseconds(runs: dict[str, Run], *, rounds: int = 15, graph_calls: int = 10) -> dict[str, float]:
    """The median time of one call of each; ``graph_calls`` of them are captured and replayed, 0 calls them directly."""
    replays: dict[str, Run] = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        if graph_calls:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(graph_calls):
                    run()
            replays[name] = graph.replay
        else:
            replays[name] = run
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):  # two to warm up
        for name, replay in replays.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            replay()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end) / max(graph_calls, 1))
    return {name: statistics.median(values) for name, values in times.items()}


def kernel_launches(run: Run) -> int:
    """Kernels, copies and fills that one call puts on the device."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.self_device_time_total > 0)


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy of 2 GiB, bytes read plus bytes written."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    time_ms = milliseconds({"copy": lambda: target.copy_(source)}, graph_calls=1)["copy"]
    return 2 * source.numel() / (time_ms * 1e-3)


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product on random data."""
    size = 4096 if dtype == torch.float32 else 8192
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    time_ms = milliseconds({"product": lambda: a @ b}, graph_calls=1)["product"]
    return 2 * size**3 / (time_ms * 1e-3)


def compiled_milliseconds(function: Callable[..., object], *arguments: object) -> float | None:
    """The time of ``torch.compile(function)``, or ``None`` where it does not compile."""
    compiled = torch.compile(function)
    try:
        return milliseconds({"compiled": lambda: compiled(*arguments)}, rounds=9)["compiled"]
    except Exception as error:
        print(f"torch.compile({function.__name__}): {error}", file=sys.stderr)
        return None


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


def quadratic(bandwidth: float) -> Table:
    """Penalty and gradient in one pass, as a share of the measured copy bandwidth."""
    columns = ["model", "tensors", "parameters", "ms", "share of copy bandwidth", "launches"]
    columns += ["called from Python ms", "Python loop ms", "torch.compile(reference) ms"]
    rows = [quadratic_row(name, shapes, bandwidth) for name, shapes in MODELS.items()]
    return Table("Quadratic penalty and gradient, float32, 20 bytes a parameter", columns, rows)


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


def path_integral(bandwidth: float) -> Table:
    """The path integral's pass as a share of the measured copy bandwidth, and beside the step it follows."""
    columns = ["model", "tensors", "parameters", "ms", "share of copy bandwidth", "launches", "called from Python ms"]
    columns += ["AdamW(fused) ms", "AdamW and ours / AdamW", "AdamW and foreach / AdamW"]
    rows = [path_integral_row(name, shapes, bandwidth) for name, shapes in MODELS.items()]
    return Table("Path integral, float32, 24 bytes a parameter", columns, rows)


# --- fisher ----------------------------------------------------------------------------------------------------------


def contraction_row(sizes: tuple[int, int, int, int], dtype: torch.dtype, rate: float, deadline: float) -> list[Cell]:
    """One shape: ours, the plain product, the reference, and the reference compiled."""
    n, t, o, i = sizes
    d, a = torch.randn(n, t, o, device="cuda").to(dtype), torch.randn(n, t, i, device="cuda").to(dtype)
    flat_d, flat_a, total = d.flatten(0, 1), a.flatten(0, 1), torch.zeros(o, i, device="cuda")
    times = milliseconds(
        {
            "ours": lambda: ops.sum_grad_squared_linear(d, a, into=total),
            "plain": lambda: flat_d.T @ flat_a,
            "reference": lambda: reference.sum_grad_squared_linear(d, a),
        }
    )
    compiled_ms = None
    if time.monotonic() < deadline and n <= 32:  # the compiled graph has a node for each sample
        compiled_ms = compiled_milliseconds(reference.sum_grad_squared_linear, d, a)
    share = 2 * n * t * o * i / (times["ours"] * 1e-3) / rate
    ratio = times["ours"] / times["plain"]
    return [", ".join(map(str, sizes)), times["ours"], times["plain"], ratio, share, times["reference"], compiled_ms]


def contraction(dtype: torch.dtype, rate: float, deadline: float) -> Table:
    """``sum_n (sum_t d a^T)^2`` beside the plain product ``d^T a`` of the same shape and precision."""
    columns = ["N, T, O, I", "ms", "plain product ms", "ratio", "share of matrix rate"]
    columns += ["reference ms", "torch.compile(reference) ms"]
    rows = [contraction_row(sizes, dtype, rate, deadline) for sizes in LINEAR_TIMED]
    return Table(f"Fisher contraction, {dtype}", columns, rows)


def whole_model_row(case: Case, batch: int) -> list[Cell]:
    """One model: ``diagonal_fisher`` on a batch, and an ordinary forward and backward pass."""
    model = case.make_model().cuda().eval()
    inputs, targets = (tensor.cuda() for tensor in case.make_batch(batch))

    def ordinary() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()

    runs = {"ours": lambda: limpet.diagonal_fisher(model, [(inputs, targets)]), "ordinary": ordinary}
    times = milliseconds(runs, rounds=20, graph_calls=0)
    return [case.name, batch, times["ours"], times["ordinary"], times["ours"] / times["ordinary"]]


def whole_models() -> Table:
    """``diagonal_fisher`` beside one ordinary pass, Python's time and the first batch's probing included."""
    columns = ["model", "batch", "ms", "ordinary pass ms", "ratio"]
    rows = [whole_model_row(MLP, 128), whole_model_row(RESNET18, 64)]
    return Table("diagonal_fisher beside one ordinary pass, float32", columns, rows)


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


def gated_lateral(deadline: float) -> Table:
    """Forward and backward beside the three bare products of the same shape and precision."""
    columns = ["dtype", "B x H", "ms", "products ms", "ratio", "at most", "eager (lerp) ms", "torch.compile(eager) ms"]
    shapes = [(4096, 4096), (4096, 512)]
    dtypes = (torch.bfloat16, torch.float32)
    rows = [gated_lateral_row(*shape, dtype, deadline) for dtype in dtypes for shape in shapes]
    return Table("Gated lateral, forward and backward, beside its three products", columns, rows)


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
    """Run every bench and write ``gpu.json`` and ``gpu.md``, anew after each table."""
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

    tables: list[Callable[[], Table]] = [lambda: quadratic(bandwidth), lambda: path_integral(bandwidth), whole_models]
    tables.append(lambda: gated_lateral(deadline))
    tables += [lambda dtype=dtype, rate=rate: contraction(dtype, rate, deadline) for dtype, rate in rates.items()]
    failures = []
    for table in tables:
        try:
            report.tables.append(table())
        except Exception as error:  # the other tables are still worth having
            failures.append(f"{type(error).__name__}: {error}")
            print(failures[-1], file=sys.stderr)
        report.write(arguments.results, "gpu")
    print(report.markdown())
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
