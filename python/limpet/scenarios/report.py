"""The report folder of a run: ``results.json`` (every number), ``report.md``, a picture of all methods and two of each.

All files are made in a temporary folder beside the report and then renamed into it, the numbers last, so that a run
that is interrupted leaves no half-written file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from limpet.scenarios import plots, seeds
from limpet.scenarios.environment import environment
from limpet.scenarios.runner import SECONDS, MethodResult, Training
from limpet.scenarios.streams import Stream, Task

_SETTINGS = {
    "task": "task-incremental: the task is known at test time, each has a head of its own",
    "domain": "domain-incremental: one head, whose outputs every task uses anew",
    "class": "class-incremental: one head over all classes, the task is not known at test time",
}

_METRICS = {"average_accuracy": ".4f", "bwt": "+.4f", "fwt": "+.4f", "forgetting": ".4f"}  # and their format
_ALL_METHODS = "average-accuracy.png"
_GROWTH = "parameters-and-seconds.png"


def write_report(
    folder: str | os.PathLike[str],
    stream: Stream,
    training: Training,
    results: Sequence[MethodResult],
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of a run; files of an older report in the same folder are replaced.

    Args:
        folder: made if it is not there, with its parents.
        stream: the tasks that were learned; of any seed, where there were several.
        training: how they were trained.
        results: what :func:`limpet.scenarios.runner.run` gave, or :func:`limpet.scenarios.seeds.run`. Where a method
            comes several times, the report shows its means and standard errors.
        arguments: what the run was asked for, kept in ``results.json`` as it is; it must be ready for JSON.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        NotADirectoryError, FileExistsError: ``folder`` is or lies below something that is not a folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stream = seeds.named(stream, results)
    numbers = summary(stream, training, results, arguments)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        methods, pictures = seeds.by_method(results), {}
        plots.average_accuracy(temporary / _ALL_METHODS, stream, methods)
        plots.parameters_and_seconds(temporary / _GROWTH, stream, methods)
        for name, runs in methods.items():
            names = [f"accuracy-matrix-{name}.png", f"accuracy-curves-{name}.png"]
            plots.accuracy_matrix(temporary / names[0], stream, seeds.mean(runs))
            plots.accuracy_curves(temporary / names[1], stream, seeds.mean(runs))
            pictures[name] = names
        (temporary / "report.md").write_text(_markdown(numbers, pictures), encoding="utf-8")
        text = json.dumps(numbers, indent=2, allow_nan=False) + "\n"
        (temporary / "results.json").write_text(text, encoding="utf-8")
        drawn = [_ALL_METHODS, _GROWTH, *itertools.chain.from_iterable(pictures.values())]
        for name in [*drawn, "report.md", "results.json"]:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def summary(
    stream: Stream,
    training: Training,
    results: Sequence[MethodResult],
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every number of a run, ready for JSON: None stands for what was not evaluated or is not defined."""
    return {
        "arguments": dict(arguments or {}),
        "environment": environment(),
        "stream": {
            "dataset": stream.name,
            "setting": stream.setting,
            "device": str(stream.device),
            "batch_size": stream.tasks[0].batch_size,
            "tasks": [_task_numbers(task) for task in stream.tasks],
        },
        "training": {"optimizer": "Adam", **{key: value for key, value in asdict(training).items() if key != "seed"}},
        "seeds": list(dict.fromkeys(result.seed for result in results)),
        "methods": {name: _method_numbers(runs) for name, runs in seeds.by_method(results).items()},
    }


def _task_numbers(task: Task) -> dict[str, Any]:
    """What a task is made of; its name alone where that is another in each run."""
    if not task.classes:
        return {"name": task.name}
    return {
        "name": task.name,
        "classes": list(task.classes),
        "train_samples": len(task.targets),
        "test_samples": task.test_batches.num_samples,
    }


def _method_numbers(runs: Sequence[MethodResult]) -> dict[str, Any]:
    """One method's numbers: means and standard errors over its seeds, and each run's own."""
    mean, values = seeds.mean(runs), [seeds.metrics(run) for run in runs]
    means = {metric: seeds.mean_and_error([run[metric] for run in values]) for metric in values[0]}
    return {
        **{metric: _number(value) for metric, (value, _) in means.items()},
        "standard_errors": {metric: _number(error) for metric, (_, error) in means.items()},
        "accuracy_matrix": _rows(mean),
        **{name: getattr(mean, name) for name in SECONDS},
        "peak_memory_bytes": mean.peak_memory_bytes,
        "num_parameters": mean.num_parameters,
        "task_parameters": mean.task_parameters,
        "task_seconds": mean.task_seconds,
        "runs": [_run_numbers(run) for run in runs],
    }


def _run_numbers(run: MethodResult) -> dict[str, Any]:
    """One run's numbers."""
    baseline = run.matrix.baseline
    return {
        "seed": run.seed,
        "tasks": list(run.tasks),
        **{metric: _number(value) for metric, value in seeds.metrics(run).items()},
        "accuracy_matrix": _rows(run),
        "baseline": None if baseline is None else [_number(value) for value in baseline.tolist()],
        "curve": [{"tasks_trained": at, "accuracies": [_number(value) for value in row]} for at, row in run.curve],
        **{name: getattr(run, name) for name in SECONDS},
        "task_seconds": run.task_seconds,
        "peak_memory_bytes": run.peak_memory_bytes,
    }


def _rows(result: MethodResult) -> list[list[float | None]]:
    """The accuracy matrix, ready for JSON."""
    return [[_number(value) for value in row] for row in result.matrix.values.tolist()]


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _markdown(numbers: dict[str, Any], pictures: Mapping[str, Sequence[str]]) -> str:
    """The report for people, from the same numbers."""
    stream, training, environment = numbers["stream"], numbers["training"], numbers["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    lines = [
        f"# {stream['dataset']}, {len(stream['tasks'])} tasks, {stream['setting']}-incremental",
        "",
        f"Setting: {_SETTINGS[stream['setting']]}.",
        f"Each task: {_length(training)}, batches of {stream['batch_size']}, "
        f"Adam with learning rate {training['learning_rate']:g}; seed {', '.join(map(str, numbers['seeds']))}; "
        f"on {stream['device']}.",
        "",
        "| method | average accuracy | BWT | FWT | forgetting | training s | consolidation s | peak memory MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, method in numbers["methods"].items():
        memory = method["peak_memory_bytes"]
        cells = [
            name,
            *(
                _format(method[metric], spec) + _error(method["standard_errors"][metric])
                for metric, spec in _METRICS.items()
            ),
            *(_format(method[f"{part}_seconds"], ".1f") for part in ("training", "consolidation")),
            _format(None if memory is None else memory / 1e6, ".1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "BWT (backward transfer) is below zero where learning made old tasks worse; FWT (forward transfer) is against",
        "the accuracy before any training. Seconds are wall-clock, without evaluation; peak memory is the growth from",
        "before the network was made.",
        *(["Over several seeds: mean ± standard error; the largest peak memory."] if len(numbers["seeds"]) > 1 else []),
        "",
        f"![average accuracy over tasks]({_ALL_METHODS})",
        f"![parameters and seconds over tasks]({_GROWTH})",
    ]
    header = "".join(f" {task['name']} |" for task in stream["tasks"])
    for name, method in numbers["methods"].items():
        lines += ["", f"## {name}", "", f"| after learning \\ accuracy on |{header} parameters | training s |"]
        lines += ["|---|" + "---:|" * (len(stream["tasks"]) + 2)]
        costs = zip(method["task_parameters"], method["task_seconds"], strict=True)
        for task, row, (parameters, seconds) in zip(stream["tasks"], method["accuracy_matrix"], costs, strict=True):
            cells = [_format(value, ".4f") for value in row] + [f"{parameters:,}", f"{seconds:.1f}"]
            lines.append(f"| {task['name']} | {' | '.join(cells)} |")
        lines += ["", *(f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures[name])]
    machine = environment["machine"]
    lines += [
        "",
        "## Made with",
        "",
        f"- {versions}; commit {environment['commit'] or 'not known'}",
        f"- {machine['cpu'] or 'unknown processor'}, {machine['cpus']} CPUs, {machine['threads']} threads",
        f"- {machine['system']}",
        *(f"- {gpu}" for gpu in machine["gpus"]),
        "",
        "Every number is in [results.json](results.json).",
    ]
    return "\n".join(lines) + "\n"


def _length(training: Mapping[str, Any]) -> str:
    """How long each task was trained for."""
    return f"{training['iterations']} steps" if training["iterations"] else f"{training['epochs']} epochs"


def _error(value: float | None) -> str:
    """A standard error behind its mean; nothing where there is none."""
    return "" if value is None else f" ± {value:.4f}"


def _format(value: float | None, spec: str) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else format(value, spec)
