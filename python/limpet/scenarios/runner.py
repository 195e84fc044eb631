"""The runner: trains methods on a stream of tasks, one after the other, and measures what each one forgot.

A method is any object with some of the moments below, or None for plain fine-tuning; the loop calls those it has:
``begin_task(task)``, ``mix(x, y)``, ``penalty()`` or ``add_penalty_grad_()``, ``project_grads_()``, ``after_step()``,
``observe(x, y, outputs)``, ``end_task(batches)``. A method that mixes or observes may replay items of several tasks:
where each task has a head of its own, ``x`` is to it the pair of images and the head of each. A method may bring a
``network`` that is to be trained in the model's place, and ``features(rows)``: what that is given as ``features=``
beside a batch of these rows of the task's images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limpet import _checks
from limpet.metrics import AccuracyMatrix
from limpet.scenarios.memory import PeakMemory
from limpet.scenarios.models import MultiHeadMLP
from limpet.scenarios.streams import Stream, Task

SECONDS = ("training_seconds", "consolidation_seconds", "evaluation_seconds")  # of a MethodResult
_REPORTS_PER_EPOCH = 10


@dataclass(frozen=True)
class Training:
    """How every method is trained: Adam, cross-entropy, and one optimizer for the whole stream.

    (Where a task brings other parameters to train, the optimizer takes them up and lets go of those that are frozen.)

    Raises:
        TypeError: a number is of the wrong type.
        ValueError: a number is out of range.
    """

    epochs: int = 4  # passes over each task
    iterations: int | None = None  # steps of each task, through as many epochs as they take; None for whole epochs
    learning_rate: float = 1e-3
    seed: int = 0  # of the network's first parameters, and of all else that is drawn from torch's generator
    evaluations_per_task: int = 8  # points of the accuracy curves, the last one when the task has ended
    consolidation_samples: int | None = None  # how many of the finished task's images end_task sees; None for all

    def __post_init__(self) -> None:
        _checks.integer("epochs", self.epochs, minimum=1)
        if self.iterations is not None:
            _checks.integer("iterations", self.iterations, minimum=1)
        if _checks.finite_number("learning_rate", self.learning_rate) <= 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate!r}")
        _checks.integer("seed", self.seed, minimum=0)
        _checks.integer("evaluations_per_task", self.evaluations_per_task, minimum=1)
        if self.consolidation_samples is not None:
            _checks.integer("consolidation_samples", self.consolidation_samples, minimum=1)

    def steps(self, task: Task) -> int:
        """How many steps of the optimizer a task is trained for."""
        return self.iterations or self.epochs * len(task.train_batches)


@dataclass(frozen=True)
class Progress:
    """Where a run stands; given to the progress callback several times an epoch."""

    method: str
    task: Task
    num_tasks: int
    epoch: int  # from 1
    num_epochs: int
    epoch_ended: bool
    loss: float  # the task's own loss, without penalties: the mean since the last report
    fraction: float  # of all steps of all methods
    seconds_left: float  # at the speed so far


@dataclass
class MethodResult:
    """What one method did on a stream."""

    method: str
    matrix: AccuracyMatrix
    curve: list[tuple[float, list[float]]] = field(default_factory=list)  # (tasks trained so far, accuracies [T])
    training_seconds: float = 0.0  # begin_task and the loop, without consolidation and evaluation
    consolidation_seconds: float = 0.0  # end_task
    evaluation_seconds: float = 0.0
    peak_memory_bytes: int | None = None  # growth from before the network was made; see PeakMemory
    num_parameters: int = 0
    seed: int = 0
    tasks: tuple[str, ...] = ()  # their names, in the order of learning
    task_parameters: list[int] = field(default_factory=list)  # num_parameters while each task was learned
    task_seconds: list[float] = field(default_factory=list)  # of training_seconds, each task's


def run(
    stream: Stream,
    methods: Mapping[str, Callable[[nn.Module], Any]],
    training: Training | None = None,
    *,
    progress: Callable[[Progress], None] | None = None,
) -> list[MethodResult]:
    """Train one network per method on all tasks of a stream, and evaluate it as it goes.

    Every method sees the same first parameters and the same batches. torch's own random state is left as it was.

    Args:
        stream: the tasks.
        methods: name -> a function that makes the method for a network, or gives None for fine-tuning.
        training: epochs, learning rate, seed and so on.
        progress: called several times an epoch.

    Raises:
        ValueError: ``methods`` is empty.
        RuntimeError: a loss became NaN or infinite.

    >>> from limpet.scenarios import datasets, streams
    >>> digits = streams.split(datasets.load("mnist-subset"), num_tasks=2)
    >>> result, = run(digits, {"finetune": lambda model: None}, Training(epochs=1))
    >>> result.matrix.num_learned
    2
    """
    if not methods:
        raise ValueError("methods must name at least one method, got none")
    training = training or Training()
    clock = _Clock(len(methods) * sum(map(training.steps, stream.tasks)), progress)
    devices = [stream.device] if stream.device.type == "cuda" else []
    results = []
    with torch.random.fork_rng(devices):
        _warm_up(stream)
        for name, make_method in methods.items():
            torch.manual_seed(training.seed)
            with PeakMemory(stream.device) as peak:
                model = MultiHeadMLP(stream.num_pixels, stream.heads).to(stream.device)
                method = make_method(model)
                model = getattr(method, "network", model)
                result = _Learner(name, stream, model, method, training, clock).learn()
            result.peak_memory_bytes = peak.bytes
            results.append(result)
            del model, method
    return results


class _Clock:
    """Counts the steps of a whole run, to tell how much of it is left."""

    def __init__(self, num_steps: int, callback: Callable[[Progress], None] | None) -> None:
        self._start, self._num_steps, self._done, self._callback = time.perf_counter(), num_steps, 0, callback

    def advance(self, steps: int, **where: Any) -> None:
        self._done += steps
        if self._callback:
            seconds = time.perf_counter() - self._start
            left = seconds / self._done * (self._num_steps - self._done)
            self._callback(Progress(**where, fraction=self._done / self._num_steps, seconds_left=left))


class _Learner:
    """One network, one method, and the loop that takes them through the stream."""

    def __init__(
        self, name: str, stream: Stream, model: MultiHeadMLP, method: Any, training: Training, clock: _Clock
    ) -> None:
        self._stream, self._model, self._training, self._clock = stream, model, training, clock
        self._optimizer: torch.optim.Optimizer  # made when the first task begins
        self._begin_task = getattr(method, "begin_task", None)
        self._features = getattr(method, "features", None)
        self._mix = getattr(method, "mix", None)
        self._add_penalty_grad = getattr(method, "add_penalty_grad_", None)
        self._penalty = None if self._add_penalty_grad else getattr(method, "penalty", None)
        self._project_grads = getattr(method, "project_grads_", None)
        self._after_step = getattr(method, "after_step", None)
        self._observe = getattr(method, "observe", None)
        self._end_task = getattr(method, "end_task", None)
        self._own_heads = stream.setting == "task" and bool(self._mix or self._observe)
        # Nothing is learned yet: the accuracies are the baseline of forward transfer, where every task can be asked.
        baseline = evaluate(model, stream, learned=-1) if stream.setting != "class" else None
        matrix = AccuracyMatrix(len(stream.tasks), baseline=baseline)
        tasks = tuple(task.name for task in stream.tasks)
        self.result = MethodResult(name, matrix, seed=training.seed, tasks=tasks)

    def learn(self) -> MethodResult:
        """Learn every task, end it, and record the accuracies."""
        for task in self._stream.tasks:
            self._model.select(task.head, task.outputs)
            before = self.result.training_seconds
            if self._begin_task:
                with self._timed("training_seconds"):
                    self._begin_task(task)
            self._optimize_what_learns()
            self._train(task)
            self.result.task_seconds.append(self.result.training_seconds - before)
            if self._end_task:
                with self._timed("consolidation_seconds"):
                    self._end_task(task.batches(epoch=0, max_samples=self._training.consolidation_samples))
            self.result.matrix.record(self._evaluate(task, fraction=1.0))
        return self.result

    def _optimize_what_learns(self) -> None:
        """Make the optimizer anew where other parameters learn than before, with its state for those that stay."""
        every = list(self._model.parameters())
        self.result.num_parameters = sum(p.numel() for p in every)
        self.result.task_parameters.append(self.result.num_parameters)
        learning, old = [p for p in every if p.requires_grad], getattr(self, "_optimizer", None)
        if old is None or {*map(id, learning)} != {*map(id, old.param_groups[0]["params"])}:
            self._optimizer = torch.optim.Adam(learning, lr=self._training.learning_rate)
            self._optimizer.state.update({p: old.state[p] for p in learning if old is not None and p in old.state})

    def _train(self, task: Task) -> None:
        """All steps of one task, with evaluations on the way."""
        per_epoch = len(task.train_batches)
        num_steps, marks = self._training.steps(task), self._training.evaluations_per_task
        evaluate_after = {num_steps * mark // marks for mark in range(1, marks)} - {0}
        report_after = {per_epoch * mark // _REPORTS_PER_EPOCH for mark in range(1, _REPORTS_PER_EPOCH + 1)} - {0}
        done = 0
        for epoch in range(-(-num_steps // per_epoch)):
            batches, losses = task.batches(epoch), list[Tensor]()
            numbered = zip(range(1, num_steps - done + 1), batches.rows(), batches, strict=False)
            with self._timed("training_seconds"):
                for step, rows, (x, y) in numbered:
                    losses.append(self._step(x, y, rows))
                    done += 1
                    if step in report_after or done == num_steps:
                        self._report(task, epoch, step == per_epoch or done == num_steps, losses)
                        losses.clear()
                    if done in evaluate_after:
                        self._evaluate(task, done / num_steps)

    def _step(self, x: Tensor, y: Tensor, rows: Any) -> Tensor:  # [B, 1, H, W], [B], int64 [B] or a slice -> 0-d
        """One step of the optimizer, and the method's moments around it; gives the task's loss."""
        inputs = (x, torch.full_like(y, self._model.head)) if self._own_heads else x
        mixed, mixed_y = self._mix(inputs, y) if self._mix else (inputs, y)
        beside = {"features": self._features(rows)} if self._features else {}
        self._optimizer.zero_grad()
        outputs = self._model(*mixed) if self._own_heads else self._model(mixed, **beside)
        loss = F.cross_entropy(outputs, mixed_y)
        (loss + self._penalty() if self._penalty else loss).backward()
        if self._add_penalty_grad:
            self._add_penalty_grad()
        if self._project_grads:
            self._project_grads()
        self._optimizer.step()
        if self._after_step:
            self._after_step()
        if self._observe:
            self._observe(inputs, y, outputs[: len(y)].detach())
        return loss.detach()

    def _report(self, task: Task, epoch: int, epoch_ended: bool, losses: list[Tensor]) -> None:
        """Check the losses since the last report, and tell where the run stands."""
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise RuntimeError(
                f"loss must be finite, got {loss} in task {task.index + 1}, epoch {epoch + 1} of {self.result.method}; "
                f"learning_rate is {self._training.learning_rate:g}"
            )
        self._clock.advance(
            len(losses),
            method=self.result.method,
            task=task,
            num_tasks=len(self._stream.tasks),
            epoch=epoch + 1,
            num_epochs=-(-self._training.steps(task) // len(task.train_batches)),
            epoch_ended=epoch_ended,
            loss=loss,
        )

    def _evaluate(self, task: Task, fraction: float) -> list[float]:
        """Add a point to the curve, with ``fraction`` of the task's training done; its time is not training time."""
        before = self.result.evaluation_seconds
        with self._timed("evaluation_seconds"):
            accuracies = evaluate(self._model, self._stream, learned=task.index)
            self._model.select(task.head, task.outputs)
        if fraction < 1:
            self.result.training_seconds -= self.result.evaluation_seconds - before
        self.result.curve.append((task.index + fraction, accuracies))
        return accuracies

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the seconds that a block takes to a field of the result."""
        start = _now(self._stream.device)
        yield
        setattr(self.result, name, getattr(self.result, name) + _now(self._stream.device) - start)


@torch.no_grad()
def evaluate(model: MultiHeadMLP, stream: Stream, *, learned: int) -> list[float]:
    """Accuracy on each task after task ``learned`` (-1: before any), NaN where it cannot be asked: [T].

    The model comes back in the mode it was in, answering the last task that was asked.
    """
    training = model.training
    model.eval()
    accuracies = [math.nan] * len(stream.tasks)
    for asked in stream.askable(learned):
        head, outputs = stream.outputs(learned, asked)
        if head >= model.num_heads:
            continue
        model.select(head, outputs)
        batches = stream.tasks[asked].test_batches
        right = sum((model(x).argmax(1) == y).sum() for x, y in batches)
        accuracies[asked] = float(right) / batches.num_samples
    model.train(training)
    return accuracies


def _warm_up(stream: Stream) -> None:
    """One step of a network that is thrown away, so that the first method does not pay for what torch sets up once."""
    model = MultiHeadMLP(stream.num_pixels, stream.heads).to(stream.device)
    x, y = next(iter(stream.tasks[0].train_batches))
    model.select(stream.tasks[0].head, stream.tasks[0].outputs)
    F.cross_entropy(model(x), y).backward()
    torch.optim.Adam(model.parameters()).step()


def _now(device: torch.device) -> float:
    """A clock's reading, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
