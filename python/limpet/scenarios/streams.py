"""Streams: a data set split into tasks of classes, in the three settings of evaluation.

(van de Ven, Tuytelaars and Tolias 2022, "Three types of incremental learning".) *Task*: the task is known at test
time, each has a head of its own. *Domain*: one head, whose outputs every task uses anew. *Class*: one head over all
classes, and a test image may be of any class seen so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from limpet import _checks
from limpet.scenarios.datasets import ImageDataset

SETTINGS = ("task", "domain", "class")


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of float images and their targets, the same ones each time they are iterated.

    Yields images [B, 1, H, W] float32 in [0, 1] and targets [B] int64, on the device of ``images``.
    """

    images: Tensor  # [N, H, W] uint8
    targets: Tensor  # [N] int64
    batch_size: int
    order: Tensor | None = None  # [M] int64, on the same device: which rows, in which order; None for all as they are

    @property
    def num_samples(self) -> int:
        """How many images one iteration gives."""
        return len(self.targets if self.order is None else self.order)

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in self.rows():
            yield self.images[rows].unsqueeze(1).float().div_(255), self.targets[rows]

    def rows(self) -> Iterator[slice | Tensor]:
        """Which rows of ``images`` each batch has."""
        for start in range(0, self.num_samples, self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield rows if self.order is None else self.order[rows]


@dataclass(frozen=True, eq=False)
class Task:
    """One task of a stream: its classes, its images, and the outputs of the network that answer it."""

    index: int
    name: str
    classes: tuple[int, ...]
    head: int  # which head of the network
    outputs: int  # how many of that head's outputs are in use once this task has begun
    images: Tensor  # [N, H, W] uint8
    targets: Tensor  # [N] int64
    test_batches: Batches
    batch_size: int
    seed: int

    @property
    def train_batches(self) -> Batches:
        """The training batches of the first epoch."""
        return self.batches(epoch=0)

    def batches(self, epoch: int, *, max_samples: int | None = None) -> Batches:
        """The training batches of an epoch, in an order that depends on seed, task and epoch alone.

        Args:
            epoch: from 0.
            max_samples: stop after this many images: a random draw, since the order is.

        Raises:
            ValueError: ``epoch`` is negative or ``max_samples`` below 1.
        """
        _checks.integer("epoch", epoch, minimum=0)
        if max_samples is not None:
            _checks.integer("max_samples", max_samples, minimum=1)
        order = np.random.default_rng([self.seed, self.index, epoch]).permutation(len(self.targets))
        rows = torch.from_numpy(order[:max_samples]).to(self.targets.device)
        return Batches(self.images, self.targets, self.batch_size, rows)


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks to be learned one after the other."""

    name: str
    setting: str
    tasks: tuple[Task, ...]
    heads: tuple[int, ...]  # the width of each head that the network needs

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.tasks[0].images.device

    @property
    def num_pixels(self) -> int:
        """The number of values in one image."""
        return self.tasks[0].images[0].numel()

    def askable(self, learned: int) -> range:
        """The tasks that can be asked after task ``learned`` (-1: before any).

        All of them, but for class-incremental evaluation: there, only tasks whose classes have been seen.
        """
        return range(learned + 1) if self.setting == "class" else range(len(self.tasks))

    def outputs(self, learned: int, asked: int) -> tuple[int, int]:
        """The head, and how many of its outputs, that answer task ``asked`` after task ``learned``."""
        task = self.tasks[asked]
        return task.head, self.tasks[learned].outputs if self.setting == "class" else task.outputs


def split(
    dataset: ImageDataset,
    *,
    num_tasks: int = 5,
    setting: str = "task",
    batch_size: int = 128,
    seed: int = 0,
    shuffle_classes: bool = False,
    all_outputs: bool = False,
    device: torch.device | str = "cpu",
) -> Stream:
    """Split a data set into tasks of as many classes each.

    Args:
        dataset: the labelled images; each class of its training part goes to one task.
        num_tasks: how many tasks; it must divide the number of classes.
        setting: ``"task"``, ``"domain"`` (both: targets 0 to k - 1 inside each task) or ``"class"`` (targets are
            positions in the order in which classes appear).
        batch_size: images a batch, for training and testing.
        seed: for the order of the images in each epoch, and of the classes if they are shuffled.
        shuffle_classes: draw the order of the classes, instead of ascending labels.
        all_outputs: class-incremental alone: the outputs of all classes are in use from the first task on, not those
            of the classes seen so far.
        device: where the images go.

    Raises:
        TypeError: a number is not an integer.
        ValueError: no such setting; ``num_tasks`` does not divide the number of classes; ``batch_size`` below 1;
            ``seed`` below 0; a class has no test image.

    >>> from limpet.scenarios.datasets import load
    >>> [task.name for task in split(load("mnist-subset")).tasks]
    ['0/1', '2/3', '4/5', '6/7', '8/9']
    """
    _checks.one_of("setting", setting, SETTINGS)
    _checks.integer("num_tasks", num_tasks, minimum=1)
    _checks.integer("batch_size", batch_size, minimum=1)
    order = np.unique(dataset.train_labels.numpy())
    if shuffle_classes:
        order = np.random.default_rng(_checks.integer("seed", seed, minimum=0)).permutation(order)
    if len(order) % num_tasks:
        raise ValueError(f"num_tasks must divide the {len(order)} classes of {dataset.name}, got {num_tasks}")
    width = len(order) // num_tasks
    tasks = []
    for index in range(num_tasks):
        classes = tuple(int(label) for label in order[index * width : (index + 1) * width])
        first = index * width if setting == "class" else 0
        images, targets = _select(dataset.train_images, dataset.train_labels, classes, first, device)
        test_images, test_targets = _select(dataset.test_images, dataset.test_labels, classes, first, device)
        if len(torch.unique(test_targets)) < width:
            raise ValueError(f"dataset must have test images of each of the classes {classes}, {dataset.name} has not")
        task = Task(
            index=index,
            name="/".join(map(str, classes)),
            classes=classes,
            head=index if setting == "task" else 0,
            outputs=len(order) if all_outputs and setting == "class" else first + width,
            images=images,
            targets=targets,
            test_batches=Batches(test_images, test_targets, batch_size),
            batch_size=batch_size,
            seed=_checks.integer("seed", seed, minimum=0),
        )
        tasks.append(task)
    heads = {"task": (width,) * num_tasks, "domain": (width,), "class": (len(order),)}[setting]
    return Stream(dataset.name, setting, tuple(tasks), heads)


def _select(
    images: Tensor,  # [N, H, W]
    labels: Tensor,  # [N]
    classes: tuple[int, ...],
    first: int,
    device: torch.device | str,
) -> tuple[Tensor, Tensor]:
    """The images of some classes on a device, with targets that count from ``first`` in the order of ``classes``."""
    targets = torch.full_like(labels, -1)
    for position, label in enumerate(classes):
        targets[labels == label] = first + position
    rows = targets >= 0
    return images[rows].to(device), targets[rows].to(device)
