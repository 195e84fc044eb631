"""One batch: its inputs, its targets, the samples in it, and the model's loss for each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from limpet import _checks
from limpet.fisher import reading
from limpet.fisher.reading import Look
from limpet.ops._fisher_launch import surely_finite, surely_same


@dataclass
class Batch:
    """``size`` samples along the first dimension of every tensor that has that size there, but for shared ones."""

    number: int  # counted from 0, for messages
    inputs: Any
    targets: Any
    samples: Sequence[int]  # the samples' own numbers, counted over all batches
    drawn: dict[int, Tensor] = field(default_factory=dict)  # labels drawn so far, by a sample's number: int64 [*]
    shared: frozenset[int] = frozenset()  # id of each input that belongs to all samples, though it has that size

    @property
    def size(self) -> int:
        """N."""
        return len(self.samples)

    def take(self, samples: slice | Tensor) -> Batch:
        """Some of the samples, as a smaller batch, with the same labels drawn."""
        inputs, targets = self._index(self.inputs, samples), self._index(self.targets, samples)
        own = self.samples[samples] if isinstance(samples, slice) else [self.samples[n] for n in samples.tolist()]
        return Batch(self.number, inputs, targets, own, self.drawn, self.shared)

    def _index(self, tree: Any, samples: slice | Tensor) -> Any:
        def pick(t: Tensor) -> Tensor:
            if not self._by_sample(t):
                return t
            return t[samples] if isinstance(samples, slice) else t[samples.to(t.device)]

        return mapped(pick, tree)

    def _by_sample(self, tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == self.size and id(tensor) not in self.shared

    def distinct(self, count: int, among: int = 32) -> Tensor:  # int64 [<= count]
        """Up to ``count`` samples with pairwise different inputs where the first ``among`` hold so many."""
        chosen: list[int] = [0]
        others: list[int] = []
        rows = [t for t in tensors(self.inputs) if self._by_sample(t)]
        for n in range(1, min(self.size, among)):
            new = all(any(not torch.equal(t[n], t[m]) for t in rows) for m in chosen)
            (chosen if new else others).append(n)
            if len(chosen) == count:
                break
        return torch.tensor(sorted((chosen + others)[:count]))  # in order: some models take samples sorted by length


# What is differentiated: K losses per sample, [N, K], from the model's outputs. The Fisher information sums the squares
# of the gradients of all K.
Objective = Callable[[Any, Batch], Tensor]


def read(batch: Any, number: int, first: int) -> Batch:
    """Read a pair (inputs, targets) whose first sample has the number ``first``."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"batches must give pairs (inputs, targets), got {_checks.describe(batch)} as batch {number}")
    inputs, targets = batch
    sizes = [[t.shape[0] for t in tensors(tree) if t.dim() > 0] for tree in (inputs, targets)]
    if not sizes[0]:
        raise TypeError(f"the inputs of batch {number} must hold a tensor, got {_checks.describe(inputs)}")
    size = (sizes[1] or sizes[0])[0]
    if size not in sizes[0]:
        raise ValueError(f"batch {number} has {size} targets, but its inputs have first dimensions {sizes[0]}")
    if size == 0:
        raise ValueError(f"batch {number} holds no samples")
    return Batch(number, inputs, targets, range(first, first + size))


def up_to(batches: Iterable[Any], max_samples: int | None) -> Iterator[Batch]:
    """Read batches until there are no more, or until exactly ``max_samples``, cutting the last one."""
    done = 0
    for number, pair in enumerate(batches):
        batch = read(pair, number, done)
        if max_samples is not None and done + batch.size > max_samples:
            batch = batch.take(slice(0, max_samples - done))
        yield batch
        done += batch.size
        if done == max_samples:
            return


def count(batches: Iterable[Any], max_samples: int | None) -> int | None:
    """How many samples there will be: known for lists, tuples and data loaders over a whole data set."""
    if isinstance(batches, (list, tuple)):
        known = sum(read(pair, number, 0).size for number, pair in enumerate(batches))
    elif isinstance(batches, DataLoader) and isinstance(batches.sampler, (SequentialSampler, RandomSampler)):
        if batches.batch_size is None:
            return None
        known = len(batches.sampler)
        known -= known % batches.batch_size if batches.drop_last else 0
    else:
        return None
    return known if max_samples is None else min(known, max_samples)


def losses_of(model: nn.Module, batch: Batch, objective: Objective, looks: Sequence[Look] = ()) -> Tensor:  # [N, K]
    """The model's losses for each sample, checked; ``looks`` come first."""
    with torch._C.DisableTorchFunction():  # looks of ours, not the model's: the recorder is not to see them
        random_state = _random_state(model)
    outputs = call(model, batch.inputs)
    with torch._C.DisableTorchFunction():
        if not all(map(_same, random_state, _random_state(model))):
            raise RuntimeError(
                "the model draws random numbers in forward (dropout in training mode?): call model.eval() first"
            )
    losses = objective(outputs, batch)
    with torch._C.DisableTorchFunction():
        _look_at(losses, batch, looks)
    return losses


def _same(a: Tensor, b: Tensor) -> bool:
    return surely_same(a, b) or torch.equal(a, b)


def _look_at(losses: Tensor, batch: Batch, looks: Sequence[Look]) -> None:  # losses [N, K]
    flags = [look.flags() for look in looks]
    if not any(flags) and surely_finite(losses):
        return
    total, *numbers = reading.read([losses.detach().sum(), *itertools.chain(*flags)])
    values = iter(numbers)
    for look, some in zip(looks, flags, strict=True):
        look.heed([*itertools.islice(values, len(some))])
    if not isfinite(total):
        bad = torch.isfinite(losses.detach()).logical_not().nonzero().tolist()
        if bad:  # a sum of finite losses may be infinite
            n, k = bad[0]
            raise RuntimeError(f"the loss of sample {n} of batch {batch.number} is {losses[n, k].item()}")


def call(model: nn.Module, inputs: Any) -> Any:
    """Call a model: a mapping gives keyword arguments, a tuple or list positional ones, anything else is the one."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _random_state(model: nn.Module) -> list[Tensor]:
    states = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():
        device = next(model.parameters()).device
        return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
    return states


def tensors(tree: Any) -> list[Tensor]:
    """Every tensor of a structure of mappings, tuples and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    return [t for value in tree for t in tensors(value)] if isinstance(tree, (tuple, list)) else []


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A structure of mappings, tuples and lists with a function's values in its tensors' places."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: mapped(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        values = [mapped(function, value) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)
    return tree
