"""Several seeds: the same methods on the same tasks, and their means with standard errors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from limpet.metrics import AccuracyMatrix
from limpet.scenarios import runner
from limpet.scenarios.runner import MethodResult, Progress, Training
from limpet.scenarios.streams import Stream


def run(
    make_stream: Callable[[int], Stream],
    methods: Mapping[str, Callable[[nn.Module], Any]],
    training: Training,
    seeds: Sequence[int],
    *,
    progress: Callable[[Progress], None] | None = None,
) -> list[MethodResult]:
    """Do :func:`limpet.scenarios.runner.run` once for each seed.

    Args:
        make_stream: gives the tasks for a seed, which their data order follows.
        methods: name -> a function that makes the method for a network, or gives None for fine-tuning.
        training: how they are trained; its own seed is not used.
        seeds: of data order, first parameters and all else that is drawn; none twice.
        progress: called several times an epoch; ``fraction`` and ``seconds_left`` are of all seeds.

    Returns:
        One result for each seed and method, seed after seed.

    Raises:
        ValueError: there is no seed, or one comes twice; and as the runner.
        RuntimeError: as the runner.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be at least one, each once, got {list(seeds)}")
    start = time.perf_counter()
    results = []
    for index, seed in enumerate(seeds):

        def show(one: Progress, index: int = index, seed: int = seed) -> None:
            if progress:
                fraction = (index + one.fraction) / len(seeds)
                left = (time.perf_counter() - start) * (1 / fraction - 1)
                method = one.method if len(seeds) == 1 else f"{one.method}, seed {seed}"
                progress(replace(one, method=method, fraction=fraction, seconds_left=left))

        results += runner.run(make_stream(seed), methods, replace(training, seed=seed), progress=show)
    return results


def by_method(results: Sequence[MethodResult]) -> dict[str, list[MethodResult]]:
    """The results of each method, in their order."""
    return {name: [r for r in results if r.method == name] for name in dict.fromkeys(r.method for r in results)}


def named(stream: Stream, results: Sequence[MethodResult]) -> Stream:
    """The stream as results of several seeds are to be shown: tasks by number where their classes were shuffled."""
    if len({run.tasks for run in results}) == 1:
        return stream
    tasks = [replace(task, name=f"task {index}", classes=()) for index, task in enumerate(stream.tasks, 1)]
    return replace(stream, tasks=tuple(tasks))


def mean(runs: Sequence[MethodResult]) -> MethodResult:
    """One method's mean over its seeds: accuracies, seconds, and the largest peak memory.

    Forgetting is not to be read from its matrix: a maximum of means is no mean of maxima. The other metrics may be.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    baselines = [run.matrix.baseline for run in runs if run.matrix.baseline is not None]
    matrix = AccuracyMatrix(first.matrix.num_tasks, baseline=torch.stack(baselines).mean(0) if baselines else None)
    for row in torch.stack([run.matrix.values for run in runs]).mean(0)[: first.matrix.num_learned]:
        matrix.record(row)
    points = zip(*(run.curve for run in runs), strict=True)
    memory = [run.peak_memory_bytes for run in runs]
    seconds = {name: statistics.fmean(getattr(run, name) for run in runs) for name in runner.SECONDS}
    return MethodResult(
        f"{first.method}, mean of {len(runs)} seeds",
        matrix,
        [(same[0][0], torch.tensor([row for _, row in same], dtype=torch.float64).mean(0).tolist()) for same in points],
        peak_memory_bytes=None if None in memory else max(filter(None, memory), default=0),
        num_parameters=first.num_parameters,
        seed=first.seed,
        tasks=first.tasks,
        task_parameters=first.task_parameters,
        task_seconds=[statistics.fmean(same) for same in zip(*(run.task_seconds for run in runs), strict=True)],
        **seconds,
    )


def metrics(result: MethodResult) -> dict[str, float]:
    """Average accuracy, BWT, FWT and forgetting at the end; NaN where one is not defined."""
    matrix = result.matrix
    return {
        "average_accuracy": matrix.average_accuracy(),
        "bwt": matrix.bwt(),
        "fwt": math.nan if matrix.baseline is None else matrix.fwt(),
        "forgetting": matrix.forgetting(),
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error (of the mean, from the sample's deviation); the error of a single value is NaN.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error
