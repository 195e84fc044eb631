"""Times on a GPU: medians of interleaved rounds by CUDA events, and the ceilings of the device."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch

Run = Callable[[], object]


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
    """Bytes per second of a device-to-device copy of 4 GiB, bytes read plus bytes written."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"copy": lambda: target.copy_(source), "kernel": lambda: torch.neg(source, out=target)}
    return 2 * source.nbytes / (min(milliseconds(runs, graph_calls=1).values()) * 1e-3)


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
