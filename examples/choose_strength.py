"""Choose EWC's strength for the second task of Split MNIST: the numbers and the pictures of docs/strength.md.

python examples/choose_strength.py                          # the images that ship with limpet
python examples/choose_strength.py --data DIR --plot DIR    # all of MNIST; pictures into a folder
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import limpet
from limpet.scenarios import datasets, streams
from limpet.scenarios.datasets import ImageDataset
from limpet.strength import StrengthSuggestion

LABELS = ("data", "sampled", "batched")
EPOCHS = 3


def hold_out(dataset: ImageDataset, share: int = 6) -> ImageDataset:
    """Every sixth training image becomes the test part: a strength must not be chosen on the test images."""
    held = torch.arange(len(dataset.train_labels)) % share == 0
    images, labels = dataset.train_images, dataset.train_labels
    return replace(
        dataset,
        train_images=images[~held],
        train_labels=labels[~held],
        test_images=images[held],
        test_labels=labels[held],
    )


def steps_of(task: streams.Task) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """All epochs' batches."""
    for epoch in range(EPOCHS):
        yield from task.batches(epoch)


def learn(model: nn.Module, task: streams.Task, ewc: limpet.EWC | None = None) -> Iterator[None]:
    """An ordinary training loop; the ``yield`` is all that a search for a strength needs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for x, y in steps_of(task):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if ewc is not None:
            ewc.add_penalty_grad_()
        optimizer.step()
        yield


@torch.no_grad()
def accuracy(model: nn.Module, task: streams.Task) -> float:
    """The share of a task's test images that are answered rightly."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in task.test_batches)
    return right / task.test_batches.num_samples


def choose(dataset: ImageDataset, labels: str, *, seed: int = 0, **options: Any) -> tuple[StrengthSuggestion, Any]:
    """Learn the first task, choose the strength for the second, and learn that with it.

    Returns:
        What was suggested; retained and new accuracy on the test images, with the best strength and with none.
    """
    first, second, *_ = streams.split(hold_out(dataset), setting="domain", seed=seed).tasks
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2)
    )
    for _ in learn(model, first):
        pass
    ewc = limpet.EWC(model, strength=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that "batched" is not the Fisher information: that is the point
        ewc.consolidate(first.train_batches, labels=labels)

    suggestion = limpet.suggest_strength(
        ewc,
        train=lambda model, ewc: learn(model, second, ewc),
        evaluate=lambda model: (accuracy(model, first), accuracy(model, second)),
        steps=EPOCHS * len(second.train_batches),
        seed=seed,
        **options,
    )

    test_first, test_second, *_ = streams.split(dataset, setting="domain").tasks
    tested = []
    for strength in (suggestion.best, 0.0):
        mine = copy.deepcopy(ewc)
        mine.strength = strength
        for _ in learn(mine.model, second, mine):
            pass
        tested.append((accuracy(mine.model, test_first), accuracy(mine.model, test_second)))
    return suggestion, tested


def main() -> None:
    """Print a table for each kind of Fisher information; draw its picture."""
    parser = argparse.ArgumentParser(description="Choose EWC's strength for the second task of Split MNIST.")
    parser.add_argument("--data", metavar="DIR", help="folder with the IDX files of MNIST; without it, a subset")
    parser.add_argument("--plot", metavar="DIR", help="draw strength-LABELS.svg into this folder")
    parser.add_argument("--labels", nargs="+", default=LABELS, choices=LABELS, help="kinds of Fisher information")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    dataset = datasets.load("mnist" if arguments.data else "mnist-subset", arguments.data)
    for labels in arguments.labels:
        suggestion, tested = choose(dataset, labels, seed=arguments.seed)
        print(f'\nlabels="{labels}"\n{suggestion}')
        for name, (retained, new) in zip(("best strength", "strength 0"), tested, strict=True):
            print(f"{name}, test images: retained {retained:.4f}, new {new:.4f}")
        if arguments.plot:
            suggestion.plot(Path(arguments.plot) / f"strength-{labels}.svg")


if __name__ == "__main__":
    main()
