"""What ``diagonal_fisher`` refuses, and that the model comes back as it was found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import limpet
from cases import CLASSES, Mean, ResNet18, images, mlp, with_statistics

BATCH = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Require that flags, gradients, hooks, parameters and buffers are the same objects with the same bytes."""

    def state() -> dict[str, Any]:
        return {
            "training": [m.training for m in model.modules()],
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "grad": [p.grad for p in model.parameters()],
            "tensors": [*model.parameters(), *model.buffers()],
            "hooks": [
                len(m._forward_hooks) + len(m._backward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
            ],
        }

    before = state()
    values = [None if t is None or t.is_meta else t.detach().clone() for t in before["tensors"] + before["grad"]]
    yield
    after = state()
    assert before["training"] == after["training"]
    assert before["requires_grad"] == after["requires_grad"]
    assert before["hooks"] == after["hooks"]
    for old, new, value in zip(
        before["tensors"] + before["grad"], after["tensors"] + after["grad"], values, strict=True
    ):
        assert old is new
        if value is not None:
            assert torch.equal(new.detach(), value)


def refused(model: Any, batches: Any, error: type[Exception], words: str, **options: Any) -> None:
    with untouched(model), pytest.raises(error, match=words):
        limpet.diagonal_fisher(model, batches, **options)


class Modify(nn.Module):
    """A linear layer with something done to its output."""

    def __init__(self, change: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.head, self.change = nn.Linear(4, 6), nn.Linear(6, CLASSES), change
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.change(self, torch.tanh(self.linear(x))))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"labels": "true"}, ValueError, "labels must be one of 'data', 'sampled', "),
        ({"loss": "mse"}, TypeError, "loss must be callable, got str 'mse'"),
        ({"max_samples": 0}, ValueError, "max_samples must be at least 1, got 0"),
        ({"max_samples": 2.0}, TypeError, "max_samples must be an integer, got float 2.0"),
        ({"progress": True}, TypeError, "progress must be callable, got bool True"),
    ],
)
def test_options(options: dict[str, Any], error: type[Exception], words: str) -> None:
    refused(mlp(4, CLASSES), [BATCH], error, re.escape(words), **options)


def test_model_that_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        limpet.diagonal_fisher(F.relu, [BATCH])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batches", "error", "words"),
    [
        (3, TypeError, "batches must be an iterable of pairs"),
        ([], ValueError, "batches must hold at least one batch"),
        (iter([]), ValueError, "batches must hold at least one batch"),
        ([BATCH, BATCH[0]], TypeError, "got a torch.float32 tensor of shape .* as batch 1"),
        ([BATCH, (BATCH[0],)], TypeError, "as batch 1"),
        ([(BATCH[0][:0], BATCH[1][:0])], ValueError, "batch 0 holds no samples"),
        ([(BATCH[0], BATCH[1][:3])], ValueError, "batch 0 has 3 targets"),
        ([("text", BATCH[1])], TypeError, "inputs of batch 0 must hold a tensor"),
    ],
)
def test_batches(batches: Any, error: type[Exception], words: str) -> None:
    refused(mlp(4, CLASSES), batches, error, words)


# --- models ----------------------------------------------------------------------------------------------------------


def test_no_parameters_that_require_a_gradient() -> None:
    refused(mlp(4, CLASSES).requires_grad_(False), [BATCH], ValueError, "no parameters that require a gradient")


def test_meta_parameters() -> None:
    refused(
        nn.Linear(4, CLASSES, device="meta"),
        [BATCH],
        ValueError,
        "'weight' must hold values, got one on the meta device",
    )


def test_parameters_on_several_devices() -> None:
    model = mlp(4, 6, CLASSES)
    model[3].to("meta")
    refused(model, [BATCH], ValueError, "must share a device, got '1.weight' on cpu and '3.weight' on meta")


def test_lazy_parameters() -> None:
    model = nn.LazyLinear(CLASSES)
    with pytest.raises(ValueError, match="'weight' has no shape yet"):
        limpet.diagonal_fisher(model, [BATCH])


def test_complex_parameters() -> None:
    refused(nn.Linear(4, CLASSES, dtype=torch.complex64), [BATCH], TypeError, "'weight' must be floating")


@pytest.mark.parametrize("statistics", [True, False])
def test_batch_norm_with_batch_statistics(statistics: bool) -> None:
    norm = nn.BatchNorm2d(4, track_running_stats=statistics)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, Mean(), nn.Linear(4, CLASSES)).train(statistics)
    refused(model, [images(3, 6, 6)(4)], RuntimeError, r"'1' \(BatchNorm2d\) .* call model.eval\(\) first")


def test_functional_batch_norm_with_batch_statistics() -> None:
    model = Modify(lambda self, h: F.batch_norm(h, None, None, training=True))
    refused(model, [BATCH], RuntimeError, r"makes samples interact: call model.eval\(\) first")


def test_instance_norm_that_updates_its_statistics() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True), Mean(), nn.Linear(4, CLASSES)
    )
    refused(model, [images(2, 6)(4)], RuntimeError, "would update its running statistics")


def test_dropout_module_in_training_mode() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, CLASSES))
    refused(model, [BATCH], RuntimeError, r"'1' \(Dropout\) drops at random in training mode")


def test_dropout_that_never_drops_is_accepted() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, CLASSES))
    assert limpet.diagonal_fisher(model, [BATCH]).num_samples == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda self, h: F.dropout(h, 0.5),
        lambda self, h: h + torch.randn_like(h),
        lambda self, h: F.rrelu(h, training=True),
    ],
    ids=["dropout", "randn_like", "rrelu"],
)
@pytest.mark.parametrize("size", [1, 4])
def test_random_functions(change: Any, size: int) -> None:
    refused(Modify(change), [(BATCH[0][:size], BATCH[1][:size])], RuntimeError, "draws random numbers in forward")


def test_embedding_with_max_norm() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0), nn.Linear(4, CLASSES))
    refused(model, [(torch.tensor([0, 1]), torch.tensor([0, 1]))], RuntimeError, "max_norm=1.0")


@pytest.mark.parametrize("how", ["in place", "assigned"])
def test_model_that_changes_its_buffer(how: str) -> None:
    def change(self: Any, h: Tensor) -> Tensor:
        if how == "in place":
            self.steps.add_(1)
        else:
            self.steps = self.steps + 1
        return h

    refused(Modify(change), [BATCH], RuntimeError, "changes its buffer 'steps' in forward")


@pytest.mark.parametrize(
    "change",
    [
        lambda self, h: h - h.mean(dim=0),
        lambda self, h: h + h.flip(0),
        lambda self, h: torch.softmax(h @ h.T, dim=1) @ h,
    ],
    ids=["centred", "flipped", "attention over the batch"],
)
def test_samples_that_interact(change: Any) -> None:
    torch.manual_seed(0)
    refused(Modify(change), [BATCH], RuntimeError, "mixes samples: they interact at or before 'head'")


def test_samples_that_interact_behind_the_last_parameter() -> None:
    model = nn.Sequential(nn.Linear(4, CLASSES), Centred())
    refused(model, [BATCH], RuntimeError, "the loss or the model mixes samples")


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.max(dim=0).values


def test_samples_that_interact_where_no_rule_covers_a_parameter() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x * self.scale
            return x - x.mean(dim=0)

    refused(Scaled(), [BATCH], RuntimeError, "the loss or the model mixes samples")


@pytest.mark.parametrize("where", [1, 3])
def test_samples_that_interact_in_a_later_batch_leave_the_sums(where: int) -> None:
    model = mlp(4, 8, CLASSES)
    accumulator = limpet.FisherAccumulator(model)
    for _ in range(3):
        accumulator.add(BATCH)
    before = accumulator.fisher()
    handle = model[where].register_forward_hook(lambda module, args, y: y - y.mean(dim=0))
    with pytest.raises(RuntimeError, match="mixes samples"):
        accumulator.add(BATCH)
    handle.remove()
    after = accumulator.fisher()
    assert after.num_samples == before.num_samples
    assert all(torch.equal(after[name], value) for name, value in before.items())
    accumulator.add(BATCH)
    for name, value in limpet.diagonal_fisher(model, [BATCH] * 4).items():
        torch.testing.assert_close(accumulator.fisher()[name], value)


def test_checkpointing() -> None:
    """What backward runs again, it runs by torch's own functions, which save other tensors."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def block(self, x: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(x))))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    refused(Checkpointed(), [BATCH], RuntimeError, "switch checkpointing off for diagonal_fisher")


def test_reentrant_checkpointing() -> None:
    """Its forward runs without gradients; what it hides must not come out as zeros."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 6)
            self.head = nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.inner, x * self.scale, use_reentrant=True))

    refused(Checkpointed(), [BATCH], RuntimeError, "heckpoint")


# --- surroundings ----------------------------------------------------------------------------------------------------


def test_inference_mode() -> None:
    model = mlp(4, CLASSES)
    with torch.inference_mode():
        refused(model, [BATCH], RuntimeError, "outside torch.inference_mode")


# --- losses and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (F.cross_entropy, r"one value per sample, .* shape \[\d\] .* got a torch.float32 tensor of shape \[\]"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none")[:, None], r"got .* of shape \[\d, 1\]"),
        (lambda o, t: 1.0, "got float 1.0"),
    ],
)
def test_loss_that_is_not_one_value_per_sample(loss: Any, words: str) -> None:
    refused(mlp(4, CLASSES), [BATCH], ValueError, words, loss=loss)


def test_loss_divided_by_the_batch() -> None:
    refused(
        mlp(4, CLASSES), [BATCH], RuntimeError, "mixes samples: in batch 0 the loss of sample 0 is",
        loss=lambda o, t: F.cross_entropy(o, t, reduction="none") / len(t),
    )  # fmt: skip


def test_loss_that_mixes_samples() -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none") + output.mean()

    refused(mlp(4, CLASSES), [BATCH], RuntimeError, "the loss or the model mixes samples", loss=loss)


def test_loss_that_depends_on_nothing() -> None:
    refused(Modify(lambda self, h: h), [BATCH], RuntimeError, "losses of batch 0 do not depend on any parameter",
            loss=lambda o, t: F.cross_entropy(o.detach(), t, reduction="none"))  # fmt: skip


def test_default_loss_with_other_outputs() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    refused(model, [BATCH], TypeError, "give loss= for this model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite(value: float) -> None:
    bad = BATCH[0].clone()
    bad[2] = value
    refused(mlp(4, CLASSES), [BATCH, (bad, BATCH[1])], RuntimeError, "the loss of sample 2 of batch 1 is nan")


@pytest.mark.parametrize("before", [0, 12])
def test_gradient_that_is_not_finite(before: int) -> None:
    model = Modify(lambda self, h: torch.where(h.sum() == 0, h, h.abs().sqrt()))
    with torch.no_grad():
        model.linear.bias.zero_()
    zeros = torch.zeros(1, 4), torch.tensor([0])  # the root's slope at 0 is infinite
    batch = torch.ones(1, 4), torch.tensor([1])
    refused(
        model, [batch] * before + [zeros], RuntimeError, rf"gradient of 'linear.weight' is not finite in .* {before}"
    )  # fmt: skip


# --- restoring -------------------------------------------------------------------------------------------------------


def test_model_and_gradients_come_back() -> None:
    torch.manual_seed(0)
    model = with_statistics(ResNet18(width=4))
    model[0].train()  # a flag of its own
    for p in list(model.parameters())[::2]:
        p.grad = torch.randn_like(p)
    model[-1].weight.register_hook(lambda grad: pytest.fail("a user's hook ran"))
    with untouched(model):
        limpet.diagonal_fisher(model, [images(3, 8, 8)(3)])


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupted_by_progress(error: type[BaseException]) -> None:
    def stop(done: int, total: int | None) -> None:
        if done == 8:
            raise error

    model = Modify(lambda self, h: h)
    with untouched(model), pytest.raises(error):
        limpet.diagonal_fisher(model, [BATCH] * 3, progress=stop)


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_interrupted_in_forward(call: int) -> None:
    """Buffers that the model had changed when it was interrupted come back; the next call is unharmed."""
    calls = 0

    def change(self: Any, h: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            self.steps.add_(1)
            raise KeyboardInterrupt
        return h

    model = Modify(change)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        limpet.diagonal_fisher(model, [BATCH] * 3)
    assert limpet.diagonal_fisher(model, [BATCH]).num_samples == 4
