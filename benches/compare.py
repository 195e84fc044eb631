"""Ratios inside one process: candidates take turns on the same work, and each round gives one ratio."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

SECONDS = 6.0  # about so long a comparison may take
MIN_ROUNDS, MAX_ROUNDS = 5, 60


@dataclass
class Row:
    """One line of the table: what was timed, against what, and the median ratio of the rounds."""

    what: str
    against: str
    target: str
    ratio: float
    quartiles: tuple[float, float]
    milliseconds: float
    peers: dict[str, float] = field(default_factory=dict)  # their ratios to the same baseline
    notes: dict[str, Any] = field(default_factory=dict)

    as_dict = asdict


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(calls: dict[str, Callable[[], Any]], *, once: bool) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one round of warm-up; a single round where ``once``."""
    warm = {name: _seconds(call) for name, call in calls.items()}
    if once:
        return {name: [seconds] for name, seconds in warm.items()}
    again = sum(_seconds(call) for call in calls.values())
    rounds = min(MAX_ROUNDS, max(MIN_ROUNDS, int(SECONDS / max(again, 1e-6))))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)  # a fixed rotation would give every candidate the same one before it, and its caches
    names = list(calls)
    for _ in range(rounds):
        order.shuffle(names)
        for name in names:
            seconds[name].append(_seconds(calls[name]))
    return seconds


def ratios(seconds: dict[str, list[float]], name: str, against: str, scale: float = 1.0) -> list[float]:
    """Round by round, the time of ``name`` over ``scale`` times the time of ``against``."""
    return [a / (scale * b) for a, b in zip(seconds[name], seconds[against], strict=True)]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that torch's CPU allocator held during a call, beyond what it held before."""
    gc.collect()  # what an earlier call left would be counted as given back
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def summarize(
    what: str,
    against: str,
    target: str,
    seconds: dict[str, list[float]],
    *,
    ours: str = "ours",
    baseline: str = "baseline",
    scale: float = 1.0,
    notes: dict[str, Any] | None = None,
) -> Row:
    """The row of a finished comparison; ``scale`` turns the baseline's seconds into the floor's."""
    mine = ratios(seconds, ours, baseline, scale)
    low, _, high = statistics.quantiles(mine, n=4, method="inclusive") if len(mine) > 1 else (mine[0],) * 3
    peers = {
        name: statistics.median(ratios(seconds, name, baseline, scale))
        for name in seconds
        if name not in (ours, baseline)
    }
    return Row(
        what,
        against,
        target,
        statistics.median(mine),
        (low, high),
        1e3 * statistics.median(seconds[ours]),
        peers,
        notes or {},
    )
