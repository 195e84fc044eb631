"""The report folder of a run: ``results.json`` (every number), ``report.md``, and a picture or two for each method.

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

from limpet.scenarios import plots
from limpet.scenarios.environment import environment
from limpet.scenarios.runner import MethodResult, Training
from limpet.scenarios.streams import Stream

_SETTINGS = {
    "task": "task-incremental: the task is known at test time, each has a head of its own",
    "domain": "domain-incremental: one head, whose outputs every task uses anew",
    "class": "class-incremental: one head over all classes, the task is not known at test time",
}


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
        stream: the tasks that were learned.
        training: how they were trained.
        results: what :func:`limpet.scenarios.runner.run` gave.
        arguments: what the run was asked for, kept in ``results.json`` as it is; it must be ready for JSON.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        NotADirectoryError, FileExistsError: ``folder`` is or lies below something that is not a folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = summary(stream, training, results, arguments)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        pictures = {}
        for result in results:
            names = [f"accuracy-matrix-{result.method}.png", f"accuracy-curves-{result.method}.png"]
            plots.accuracy_matrix(temporary / names[0], stream, result)
            plots.accuracy_curves(temporary / names[1], stream, result)
            pictures[result.method] = names
        (temporary / "report.md").write_text(_markdown(numbers, pictures), encoding="utf-8")
        text = json.dumps(numbers, indent=2, allow_nan=False) + "\n"
        (temporary / "results.json").write_text(text, encoding="utf-8")
        for name in [*itertools.chain.from_iterable(pictures.values()), "report.md", "results.json"]:
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
            "seed": stream.tasks[0].seed,
            "tasks": [
                {
                    "name": task.name,
                    "classes": list(task.classes),
                    "train_samples": len(task.targets),
                    "test_samples": task.test_batches.num_samples,
                }
                for task in stream.tasks
            ],
        },
        "training": {"optimizer": "Adam", **asdict(training)},
        "methods": {result.method: _method_numbers(result) for result in results},
    }


def _method_numbers(result: MethodResult) -> dict[str, Any]:
    """One method's numbers."""
    matrix = result.matrix
    baseline = matrix.baseline
    return {
        "average_accuracy": _number(matrix.average_accuracy()),
        "bwt": _number(matrix.bwt()),
        "fwt": None if baseline is None else _number(matrix.fwt()),
        "forgetting": _number(matrix.forgetting()),
        "accuracy_matrix": [[_number(value) for value in row] for row in matrix.values.tolist()],
        "baseline": None if baseline is None else [_number(value) for value in baseline.tolist()],
        "curve": [{"tasks_trained": at, "accuracies": [_number(value) for value in row]} for at, row in result.curve],
        "training_seconds": result.training_seconds,
        "consolidation_seconds": result.consolidation_seconds,
        "evaluation_seconds": result.evaluation_seconds,
        "peak_memory_bytes": result.peak_memory_bytes,
        "num_parameters": result.num_parameters,
    }


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
        f"Each task: {training['epochs']} epochs of {stream['tasks'][0]['train_samples']} images, batches of "
        f"{stream['batch_size']}, Adam with learning rate {training['learning_rate']:g}; seed {training['seed']}; "
        f"on {stream['device']}.",
        "",
        "| method | average accuracy | BWT | FWT | forgetting | training s | consolidation s | peak memory MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, method in numbers["methods"].items():
        memory = method["peak_memory_bytes"]
        cells = [
            name,
            _format(method["average_accuracy"], ".4f"),
            *(_format(method[metric], "+.4f") for metric in ("bwt", "fwt")),
            _format(method["forgetting"], ".4f"),
            *(_format(method[f"{part}_seconds"], ".1f") for part in ("training", "consolidation")),
            _format(None if memory is None else memory / 1e6, ".1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "BWT (backward transfer) is below zero where learning made old tasks worse; FWT (forward transfer) is against",
        "the accuracy before any training. Seconds are wall-clock, without evaluation; peak memory is the growth from",
        "before the network was made.",
    ]
    header = "".join(f" {task['name']} |" for task in stream["tasks"])
    for name, method in numbers["methods"].items():
        lines += ["", f"## {name}", "", f"| after learning \\ accuracy on |{header}"]
        lines += ["|---|" + "---:|" * len(stream["tasks"])]
        for task, row in zip(stream["tasks"], method["accuracy_matrix"], strict=True):
            lines.append(f"| {task['name']} |" + "".join(f" {_format(value, '.4f')} |" for value in row))
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


def _format(value: float | None, spec: str) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else format(value, spec)
