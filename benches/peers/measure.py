"""Time, peak memory and error of methods on one problem, all in one process, in turns."""

from __future__ import annotations

import copy
import importlib.metadata
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from compare import peak_bytes, ratios
from peers.methods import Method, Ready, Values, ordinary, sample_loop
from peers.problems import Problem
from tolerances import relative_error

WRONG = 1e-4  # a relative error above this is no rounding
MIN_ROUNDS, MAX_ROUNDS = 2, 40  # two are enough only where one takes the better part of a minute


@dataclass
class Answer:
    """What a method made of a problem; what was not measured, because it failed, is None."""

    method: str
    package: str
    version: str | None
    note: str = ""
    batches: int = 1
    error: float | None = None  # relative, of the worst tensor that it gave
    worst: str | None = None  # that tensor's name
    missing: tuple[str, ...] = ()  # tensors that it did not give
    tensors: int = 0  # that there are
    failure: str | None = None  # the first line of its error
    refused: bool = False  # it, or torch, raised the error on purpose
    ratio: float | None = None  # its time over the ordinary pass's, the median of the rounds
    quartiles: tuple[float, float] | None = None
    milliseconds: float | None = None  # for one batch
    peak: int | None = None  # bytes that torch allocated during a call, its result included

    as_dict = asdict

    @property
    def right(self) -> bool:
        """Every tensor is there and none is off by more than rounding."""
        return self.failure is None and not self.missing and self.error is not None and self.error <= WRONG


def version_of(package: str) -> str | None:
    """An installed distribution's version."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def first_line(error: BaseException) -> str:
    """An error's kind and the first line of its message."""
    message = str(error).strip()
    return f"{type(error).__name__}: {message.splitlines()[0] if message else ''}".rstrip(": ")


def on_purpose(error: BaseException) -> bool:
    """Whether the innermost line of an error's traceback raises it: a refusal, where anything else is a breakdown."""
    frames = traceback.extract_tb(error.__traceback__)
    line = (frames[-1].line or "") if frames else ""
    return line.lstrip().startswith("raise") and not isinstance(error, (ImportError, AttributeError))


def exact(problem: Problem) -> dict[str, torch.Tensor]:
    """The mean of squared per-sample gradients: a loop over single samples in float64."""
    inputs = problem.inputs.double() if problem.inputs.is_floating_point() else problem.inputs
    model = copy.deepcopy(problem.original).double()
    ready = sample_loop(Problem(model, inputs, problem.targets, problem.loss))
    return {name: value * ready.scale for name, value in ready.run().items()}


def best_factor(values: Values, want: Values) -> float:
    """The factor with which values come closest to what they should be, by least squares over all parameters."""
    pairs = [(values[name].double(), want[name]) for name in want if name in values]
    squares = sum(float(got.square().sum()) for got, _ in pairs)
    return sum(float((got * wanted).sum()) for got, wanted in pairs) / squares if squares else 1.0


def error_of(values: Values, scale: float, want: Values) -> tuple[float | None, str | None, tuple[str, ...]]:
    """The largest relative error among the tensors given, that tensor's name, and the names of those not given."""
    missing = tuple(name for name in want if name not in values)
    errors = {name: relative_error(values[name] * scale, want[name]) for name in want if name in values}
    worst = max(errors, key=lambda name: errors[name], default=None)
    return (errors[worst] if worst else None), worst, missing


def answer(method: Method, problem: Problem, want: Values | None) -> tuple[Answer, Ready | None]:
    """Make a method ready, call it once and judge what it gives; an exception is part of the answer."""
    row = Answer(method.name, method.package, version_of(method.package), method.note)
    given: list[Values] = []
    try:
        ready = method.prepare(problem)
        row.peak = peak_bytes(lambda: given.append(ready.run()))
    except Exception as error:
        row.failure, row.refused = first_line(error), on_purpose(error)
        return row, None
    row.batches = ready.batches
    if want is not None:
        row.tensors = len(want)
        scale = best_factor(given[0], want) if ready.scale is None else ready.scale
        row.error, row.worst, row.missing = error_of(given[0], scale, want)
    return row, ready


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of packages about their own insides."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call in each round, for about so long; every call must have been made once before."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    for index in range(MAX_ROUNDS):
        elapsed = time.perf_counter() - start
        if index >= MIN_ROUNDS and elapsed * (index + 1) / index > seconds:
            break
        first = index % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            calls[name]()
            took[name].append(time.perf_counter() - begin)
    return took


def measure(problem: Problem, methods: Sequence[Method], seconds: float, want: Values | None) -> dict[str, Any]:
    """Answers of all methods to one problem, those that gave one timed and their memory measured.

    Returns:
        ``baseline``: milliseconds and peak bytes of the ordinary pass; ``answers``: one per method.
    """
    with quiet():
        base = ordinary(problem)
        base.run()
        peak = peak_bytes(base.run)
        answers = [answer(method, problem, want) for method in methods]
        ready = {row.method: made for row, made in answers if made is not None}
        calls = {"": base.run, **{name: made.run for name, made in ready.items()}}
        took = in_turns(calls, seconds)
    for row, made in answers:
        if made is None:
            continue
        found = ratios(took, row.method, "", made.batches)
        low, _, high = statistics.quantiles(found, n=4, method="inclusive")
        row.ratio, row.quartiles = statistics.median(found), (low, high)
        row.milliseconds = 1e3 * statistics.median(took[row.method]) / made.batches
    return {
        "baseline": {"milliseconds": 1e3 * statistics.median(took[""]), "peak": peak, "rounds": len(took[""])},
        "parameter_bytes": sum(p.numel() * p.element_size() for p in problem.original.parameters()),
        "answers": [row.as_dict() for row, _ in answers],
    }
