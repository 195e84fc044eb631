"""What narrow storage costs in accuracy: prints the tables of docs/narrow.md.

An MLP learns one half of MNIST's digits, its importances are measured, and it learns the other half under the penalty;
then Split MNIST, where importances and anchors are stored anew after each task.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import mean, stdev

import torch
from torch import Tensor, nn

import limpet
from limpet import ops, reference
from limpet.scenarios import datasets

Tensors = list[Tensor]
Data = tuple[Tensor, Tensor]  # [N, 784] float32, [N] int64

ANCHORS: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda a: a,
    "split24": lambda a: ops.pack_anchor(a, "split24"),
    "fixed16": ops.pack_anchor,
    "bfloat16": lambda a: a.bfloat16(),
}
IMPORTANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "float32": lambda f: f,
    "bfloat16": lambda f: f.bfloat16(),
    "log8": ops.pack_importance,
}
AT_RANDOM = "log8, rounded at random"
STEPS = (1, 10, 100)  # of the second half, after which errors are measured
SEEDS = range(5)


@dataclass
class Storage:
    """One quadratic over all parameters, stored in two formats."""

    anchor: str
    importance: str
    anchors: Tensors = field(default_factory=list)
    importances: Tensors = field(default_factory=list)
    generator: torch.Generator = field(default_factory=torch.Generator)

    def dense(self, params: Tensors) -> tuple[Tensors, Tensors]:
        """Anchors and importances in float32."""
        return (
            [reference.dense_anchor(a, p) for a, p in zip(self.anchors, params, strict=True)],
            [reference.dense_importance(f, p) for f, p in zip(self.importances, params, strict=True)],
        )

    def store(self, anchors: Tensors, importances: Tensors) -> None:
        self.anchors = [ANCHORS[self.anchor](a) for a in anchors]
        if self.importance == AT_RANDOM:
            self.importances = [ops.pack_importance(f, generator=self.generator) for f in importances]
        else:
            self.importances = [IMPORTANCES[self.importance](f) for f in importances]

    def merge(self, here: Tensors, new: Tensors) -> None:
        """Add a task's quadratic, exactly but for what storing rounds."""
        if not self.anchors:
            return self.store(here, new)
        anchors, old = self.dense(here)
        totals = [f + g for f, g in zip(old, new, strict=True)]
        shares = [torch.where(t > 0, g / t, 1.0) for g, t in zip(new, totals, strict=True)]
        merged = [a + s * (p - a) for a, s, p in zip(anchors, shares, here, strict=True)]
        return self.store(merged, totals)


def mlp(classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes))


def train(model: nn.Module, data: Data, steps: int, storage: Storage | None = None, strength: float = 0.0) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
        if storage and storage.anchors:
            ops.add_quadratic_penalty_grad_(list(model.parameters()), storage.anchors, storage.importances, strength)
        optimizer.step()


def here_and_fisher(model: nn.Module, data: Data) -> tuple[Tensors, Tensors]:
    fisher = limpet.diagonal_fisher(model, [(data[0][:1000], data[1][:1000])])
    return [p.detach().clone() for p in model.parameters()], [fisher[name] for name, _ in model.named_parameters()]


def relative(got: Tensors, want: Tensors) -> float:
    """||got - want|| / ||want|| over all tensors."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(got, want, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in want)) ** 0.5


def errors(images: Data) -> None:
    """Relative errors of the penalty's gradient and value, by format and by steps from the anchor."""
    first = images[1] < 5
    halves = [(images[0][rows], images[1][rows]) for rows in (first, ~first)]
    torch.manual_seed(0)
    model = mlp(10)
    train(model, halves[0], 300)
    exact = Storage("float32", "float32")
    exact.store(*here_and_fisher(model, halves[0]))
    count = sum(p.numel() for p in model.parameters())
    places = []
    for steps in (STEPS[0], *(b - a for a, b in itertools.pairwise(STEPS))):
        train(model, halves[1], steps, exact, 1e3)
        places.append([p.detach().clone() for p in model.parameters()])
    one = torch.tensor(1.0)
    print("| anchor | importance | bytes | " + " | ".join(f"gradient, {s}" for s in STEPS) + " | value, 1 | 10 | 100 |")
    print("|" + "---|" * 9)
    for anchor in ANCHORS:
        for importance in IMPORTANCES:
            stored = Storage(anchor, importance)
            stored.store(exact.anchors, exact.importances)
            held = sum(t.numel() * t.element_size() for t in stored.anchors + stored.importances) / count
            cells = []
            for theta in places:
                lists, wide = (theta, *stored.dense(theta)), (theta, exact.anchors, exact.importances)
                got, want = (reference.quadratic_penalty_grad(*each, 1.0, one) for each in (lists, wide))
                value, true = (float(reference.quadratic_penalty(*each, 1.0)) for each in (lists, wide))
                cells.append((relative(got, want), abs(value / true - 1)))
            print(
                f"| {anchor} | {importance} | {held:.3f} | "
                + " | ".join(f"{gradient:.1e}" for gradient, _ in cells)
                + " | "
                + " | ".join(f"{value:.1e}" for _, value in cells)
                + " |"
            )


def split_mnist(images: Data, tests: Data, strength: float) -> None:
    """Average accuracy after five tasks of two digits, domain-incremental, with the quadratic stored anew each time."""
    print(f"\n| anchor | importance | average accuracy, % (strength {strength:g}) |\n|---|---|---|")
    for anchor, importance in (
        [("float32", "float32")]
        + [(a, "log8") for a in ANCHORS]
        + [("fixed16", AT_RANDOM)]
        + [("bfloat16", "bfloat16")]
    ):
        averages = []
        for seed in SEEDS:
            torch.manual_seed(seed)
            model, storage = mlp(2), Storage(anchor, importance)
            for task in range(5):
                rows = images[1] // 2 == task
                data = images[0][rows], images[1][rows] % 2
                train(model, data, 100, storage, strength)
                storage.merge(*here_and_fisher(model, data))
            with torch.no_grad():
                right = (model(tests[0]).argmax(1) == tests[1] % 2).double()
            averages.append(100 * mean(float(right[tests[1] // 2 == task].mean()) for task in range(5)))
        print(f"| {anchor} | {importance} | {mean(averages):.2f} ± {stdev(averages):.2f} |")


def many_tasks() -> None:
    """How far importances stay behind when a hundred equal tasks are merged one after the other."""
    torch.manual_seed(0)
    task = [torch.exp2(-8 * torch.rand(1_000_000))]
    here = [torch.zeros(1_000_000)]
    print("\n| importance | of 10 tasks' sum | of 100 tasks' sum |\n|---|---|---|")
    for importance in (*IMPORTANCES, AT_RANDOM):
        storage = Storage("float32", importance)
        kept = {}
        for k in range(1, 101):
            storage.merge(here, task)
            kept[k] = float(storage.dense(here)[1][0].sum() / (k * task[0].sum()))
        print(f"| {importance} | {kept[10]:.3f} | {kept[100]:.3f} |")


def flat(images: Tensor, labels: Tensor) -> Data:
    return images.flatten(1).float() / 255, labels


if __name__ == "__main__":
    torch.set_num_threads(1)
    digits = datasets.load("mnist-subset")
    train_data = flat(digits.train_images, digits.train_labels)
    errors(train_data)
    many_tasks()
    split_mnist(train_data, flat(digits.test_images, digits.test_labels), strength=1e4)
