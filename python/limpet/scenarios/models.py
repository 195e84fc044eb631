"""Networks for streams of tasks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks
from limpet.buffers.memory import require_room
from limpet.methods import ProgressiveNetwork
from limpet.methods.progressive import FeatureCache
from limpet.scenarios.streams import Batches


class MultiHeadMLP(nn.Module):
    """A perceptron with shared ReLU layers and one or more linear heads, of which one answers at a time.

    ``model(x)`` gives the outputs of the head that was last selected, so that a training loop, and whatever looks at
    the model through one, need not know about tasks. (The network of van de Ven et al. 2022 for Split MNIST:
    784-400-400.)

    Args:
        num_inputs: values in one input, after flattening.
        heads: the number of outputs of each head.
        hidden: the width of each shared layer.

    Raises:
        TypeError: a width is not an integer.
        ValueError: a width is below 1, or there is no head.

    >>> import torch
    >>> model = MultiHeadMLP(4, heads=[2, 3], hidden=[8])
    >>> model.select(1)
    >>> model(torch.zeros(5, 1, 2, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, num_inputs: int, heads: Sequence[int], hidden: Sequence[int] = (400, 400)) -> None:
        super().__init__()
        if not heads:
            raise ValueError(f"heads must name at least one head, got {_checks.describe(heads)}")
        widths = [_checks.integer("num_inputs", num_inputs, minimum=1)]
        widths += [_checks.integer(f"hidden[{i}]", width, minimum=1) for i, width in enumerate(hidden)]
        self.widths = tuple(widths)
        self.shared = _shared_layers(widths)
        self._head_widths = [_checks.integer(f"heads[{i}]", width, minimum=1) for i, width in enumerate(heads)]
        self.heads = nn.ModuleList(nn.Linear(widths[-1], width) for width in self._head_widths)
        self.select(0)

    @property
    def num_heads(self) -> int:
        """How many heads can be asked."""
        return len(self.heads)

    def select(self, head: int, outputs: int | None = None) -> None:
        """Let one head answer from now on, with its first ``outputs`` outputs (all, when not given).

        Raises:
            TypeError: one of them is not an integer.
            ValueError: there is no such head, or it has not so many outputs.
        """
        if _checks.integer("head", head, minimum=0) >= len(self.heads):
            raise ValueError(f"head must be below {len(self.heads)}, got {head}")
        width = self._head_widths[head]
        if outputs is not None and _checks.integer("outputs", outputs, minimum=1) > width:
            raise ValueError(f"outputs must be at most {width}, the width of head {head}, got {outputs}")
        self.head, self.outputs = head, outputs or width

    def forward(
        self,
        x: Tensor,  # [N, *], * flattens to num_inputs
        heads: Tensor | None = None,  # int64 [N]
    ) -> Tensor:  # [N, outputs]
        """The selected outputs of the selected head, or of each row's own head where ``heads`` are given.

        Raises:
            ValueError: rows have heads of their own, and those are not all as wide.
        """
        hidden = self.shared(x)
        if heads is not None:
            if len(set(self._head_widths)) > 1:
                raise ValueError(f"heads must be as wide as each other to answer one batch, got {self._head_widths}")
            every = torch.stack([head(hidden) for head in self.heads], 1)  # [N, H, outputs]
            return every[torch.arange(len(heads), device=heads.device), heads]
        logits: Tensor = self.heads[self.head](hidden)
        return logits if self.outputs == self._head_widths[self.head] else logits[:, : self.outputs]


class ProgressiveMLP(nn.Module):
    """A :class:`limpet.ProgressiveNetwork` of perceptrons in the place of a :class:`MultiHeadMLP`.

    Each head is a column with layers of its own, made when its task begins. It is a method for the runner, too, and
    brings itself as the network to be trained.

    Args:
        num_inputs: values in one input, after flattening.
        hidden: the width of each of a column's ReLU layers.
        lateral: as for :class:`limpet.ProgressiveNetwork`.
        cache: compute what a column reads of earlier ones once for its task's images, where that fits in memory. (In
            batches of consecutive images: the last bits of a matrix product may differ from those without.)
        say: is told beforehand how many bytes that takes, and whether they fit.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> model = ProgressiveMLP(4, hidden=[8])
    >>> model.begin_task(SimpleNamespace(head=0, outputs=2))
    >>> model(torch.zeros(5, 1, 2, 2)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        num_inputs: int,
        hidden: Sequence[int] = (400, 400),
        *,
        lateral: str = "adapter",
        cache: bool = False,
        say: Callable[[str], object] = print,
    ) -> None:
        super().__init__()
        widths = [num_inputs, *hidden]

        def column(outputs: int) -> nn.Module:
            return nn.Sequential(*_shared_layers(widths), nn.Linear(widths[-1], outputs))

        self.columns = ProgressiveNetwork(column, lateral=lateral)
        self.head = 0
        self._caches, self._say = cache, say
        self._cache: FeatureCache | None = None  # of the task that is being learned

    @classmethod
    def beside(cls, model: Any, **options: Any) -> ProgressiveMLP:
        """Columns whose layers are as wide as a :class:`MultiHeadMLP`'s, where that is."""
        num_inputs, *hidden = model.widths
        return cls(num_inputs, hidden, **options).to(next(model.parameters()).device)

    @property
    def network(self) -> ProgressiveMLP:
        """What the runner is to train: this."""
        return self

    @property
    def num_heads(self) -> int:
        """How many heads can be asked: one for each task that has begun."""
        return len(self.columns.tasks)

    def select(self, head: int, outputs: int | None = None) -> None:
        """Let one head answer from now on, with all its outputs."""
        self.head = head

    def begin_task(self, task: Any) -> None:
        """Add a column for ``task.head``, with ``task.outputs`` outputs."""
        self.columns.add_column(task.head, outputs=task.outputs)
        self.select(task.head)
        if self._caches and len(self.columns.tasks) > 1:
            self._cache = self._cached(task)

    def _cached(self, task: Any) -> FeatureCache | None:
        """What the new column reads of earlier ones for a task's images, unless there is no room."""
        images, _ = next(iter(Batches(task.images, task.targets, len(task.targets))))
        nbytes = self.columns.cache_nbytes(images, task.head)
        what = f"earlier columns' features for {len(images)} images of task {task.name}: {nbytes} bytes"
        try:
            require_room([nbytes], images.device, what="cached features")
        except ValueError as error:
            self._say(f"{what}; not cached: {error}")
            return None
        self._say(what)
        return self.columns.cache_features(images, task.head, batch_size=task.batch_size)

    def features(self, rows: Tensor) -> FeatureCache | None:  # int64 [N]
        """What the column reads of earlier ones for these rows of the task's images; None where it is not cached."""
        return None if self._cache is None else self._cache[rows]

    def end_task(self, batches: Any = None) -> None:
        """Freeze the column, and let go of cached features."""
        self.columns.freeze()
        self._cache = None

    def forward(
        self,
        x: Tensor,  # [N, *], * flattens to num_inputs
        *,
        features: FeatureCache | None = None,
    ) -> Tensor:  # [N, outputs]
        """The outputs of the selected head; where :meth:`features` are given earlier columns do not run."""
        logits: Tensor = self.columns(x, self.head, features=features)
        return logits


def _shared_layers(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU behind each, over flattened inputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)
