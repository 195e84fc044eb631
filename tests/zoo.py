"""What the zoo of small random models is made of: an entry, a module out of a function, batches, and the definition.

``zoo_attention``, ``zoo_recurrent``, ``zoo_vision``, ``zoo_reuse`` and ``zoo_custom`` hold the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N_CLASSES, WIDTH, LENGTH, VOCABULARY = 4, 8, 5, 11
SIZES = 3, 1, 6, 5  # uneven, a single sample, and as many samples as places

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}

Batches = list[tuple[Any, Any]]
Loss = Callable[[Any, Any], Tensor]
EVERY = frozenset({"*"})


class Entry(NamedTuple):
    """A model, its batches and its loss (the default one when None).

    ``expected_routes`` holds patterns (as of fnmatch) of the parameters that must not go the per-sample way; None
    expects nothing yet.
    """

    name: str
    make_model: Callable[[], nn.Module]
    make_batches: Callable[[], Batches]
    loss: Loss | None = None
    expected_routes: frozenset[str] | None = EVERY


class Net(nn.Module):
    """``forward(self, *inputs)`` as a function, beside the modules and parameters that it reads."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.function(self, *inputs, **named)


def head(width: int = WIDTH) -> nn.Linear:
    return nn.Linear(width, N_CLASSES)


def batches(make: Callable[[int], tuple[Any, Any]], sizes: tuple[int, ...] = SIZES) -> Callable[[], Batches]:
    """One batch of each size."""
    return lambda: [make(n) for n in sizes]


def labelled(*shape: int) -> Callable[[], Batches]:
    """Normal noise ``[n, *shape]`` and a class for each sample."""
    return batches(lambda n: (torch.randn(n, *shape), classes(n)))


def classes(n: int, *places: int) -> Tensor:  # [n, *places]
    return torch.randint(N_CLASSES, (n, *places))


def lengths(n: int, longest: int = LENGTH) -> Tensor:  # [n], from 1 to `longest`, which occurs
    drawn = torch.randint(1, longest + 1, (n,))
    drawn[torch.randint(n, ())] = longest
    return drawn


def padding(counts: Tensor, longest: int) -> Tensor:  # [n] -> [n, longest], True beyond the end
    return torch.arange(longest, device=counts.device) >= counts[:, None]


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:  # [N, T, V], [N, T] with -100 where nothing is asked -> [N]
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)


def squared(output: Tensor, target: Tensor) -> Tensor:  # [N, *] twice -> [N]
    return (output - target).square().flatten(1).sum(dim=1)


# --- the definition --------------------------------------------------------------------------------------------------


def tree_map(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: tree_map(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(tree_map(function, value) for value in tree)
    return tree


def in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def single_samples(found: Batches) -> Iterator[tuple[Any, Any]]:
    """Every sample as a batch of its own; a tensor whose first dimension is not the batch's belongs to all."""
    for inputs, targets in found:
        sizes: list[int] = []
        tree_map(lambda t, sizes=sizes: sizes.append(len(t)) or t, targets)
        for n in range(sizes[0]):
            yield tree_map(
                lambda t, n=n, size=sizes[0]: t[n : n + 1] if t.dim() and len(t) == size else t, (inputs, targets)
            )


def assert_exact(got: Mapping[str, Tensor], want: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Require the relative error of each parameter to be within the bound for ``dtype``.

    A gradient that is zero by its form (of a bias on attention's keys) comes out as rounding: epsilon, beside the
    largest gradient of the model.
    """
    assert list(got) == list(want)
    noise = torch.finfo(dtype).eps ** 2 * max(value.amax().item() for value in want.values())
    for name, value in want.items():
        assert got[name].shape == value.shape
        assert got[name].dtype == dtype
        error = (got[name].double() - value).abs().max().item()
        largest = value.amax().item()
        assert error <= BOUND[dtype] * largest + noise, f"{name}: {error:.2e} against {largest:.2e}"


def definition(model: nn.Module, found: Batches, loss: Loss | None = None) -> dict[str, Tensor]:
    """The mean over samples of the squared gradient of one sample alone, in float64."""
    model, params = model.double(), {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    singles = list(single_samples(in_dtype(found, torch.float64)))
    for inputs, targets in singles:
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
        value = loss(output, targets) if loss else F.cross_entropy(output, targets, reduction="sum")
        grads = torch.autograd.grad(value.sum(), list(params.values()), allow_unused=True)
        for total, grad in zip(sums.values(), grads, strict=True):
            if grad is not None:
                total += grad.to_dense().square() if grad.is_sparse else grad.square()
    return {name: total / len(singles) for name, total in sums.items()}
