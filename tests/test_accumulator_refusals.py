"""What ``FisherAccumulator`` refuses, and that nothing of a refused batch counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limpet
from accumulators import HiddenLinear, Rooted, accumulated, assert_same, model_and_batches
from cases import CLASSES, mlp
from limpet.fisher import sums

# --- states -----------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state | changes


STATES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda state: [1], TypeError, "{} must be a state_dict of a FisherAccumulator, got list"),
    (lambda state: {"labels": "data"}, ValueError, "{} must have the keys"),
    (changed(labels="sampled"), ValueError, "{} must hold sums for labels='data', got str 'sampled'"),
    (changed(seed=-1), ValueError, "{}['seed'] must be at least 0"),
    (changed(num_samples=1.5), TypeError, "{}['num_samples'] must be an integer"),
    (changed(num_batches=-1), ValueError, "{}['num_batches'] must be at least 0"),
    (changed(loss_scale="1"), TypeError, "{}['loss_scale'] must be"),
    (changed(loss_scale=0.5), ValueError, "{}['loss_scale'] must be"),
    (changed(routes=None), ValueError, "{}['routes'] must hold a route for each parameter, got NoneType None"),
    (changed(routes={"elsewhere": "fused"}), ValueError, "{}['routes'] must hold a route for each parameter"),
    (lambda s: s | {"routes": s["routes"] | {"1.bias": "any"}}, ValueError, "{}['routes'] must hold a route for each"),
    (changed(running=None), TypeError, "{}['running'] must be a mapping"),
    (changed(running={}), ValueError, "{}['running'] must hold the parameters of this model, not so: ['1.bias'"),
    (lambda s: s | {"running": s["running"] | {"1.bias": torch.zeros(7)}}, ValueError, "['1.bias'] must have shape"),
    (lambda s: s | {"running": s["running"] | {"1.bias": [0.0] * 6}}, TypeError, "['1.bias'] must be a torch.Tensor"),
    (lambda s: s | {"totals": s["running"] | {"1.bias": torch.full((6,), torch.nan)}}, ValueError, "must be finite"),
]


@pytest.mark.parametrize(("change", "error", "words"), STATES)
@pytest.mark.parametrize("how", ["load_state_dict", "merge"])
def test_states_that_do_not_fit(change: Any, error: type[Exception], words: str, how: str) -> None:
    model, batches = model_and_batches([3])
    accumulator = accumulated(model, batches)
    before = accumulator.fisher()
    state = change(accumulator.state_dict())
    name = "state" if how == "load_state_dict" else "other"
    with pytest.raises(error, match=re.escape(words.format(name))):
        getattr(accumulator, how)(state)
    assert_same(accumulator.fisher(), before)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch", [3, (torch.randn(3, 4), torch.zeros(2)), (torch.zeros(0, 4), torch.zeros(0)), ("text", None)]
)
def test_a_batch_that_is_none_changes_nothing(batch: Any) -> None:
    model, batches = model_and_batches([3, 3])
    accumulator = accumulated(model, batches[:1])
    with pytest.raises((TypeError, ValueError)):
        accumulator.add(batch)
    accumulator.add(batches[1])
    assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches))


def test_a_batch_that_is_refused_changes_nothing() -> None:
    model, batches = model_and_batches([3, 3])
    accumulator = accumulated(model, batches[:1])
    bad = batches[1][0].clone()
    bad[1] = torch.nan
    for refused, words in (((bad, batches[1][1]), "loss of sample 1 of batch 1 is nan"), ((bad[:, :3], None), "shape")):
        with pytest.raises(RuntimeError, match=words):
            accumulator.add(refused)
    with pytest.raises(ValueError, match="one value per sample"):
        limpet.FisherAccumulator(model, loss=lambda o, y: o).add(batches[1])
    accumulator.add(batches[1])
    assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches))


def test_what_was_found_out_on_a_refused_batch_is_forgotten() -> None:
    """The probe finds nothing here: the loss depends on how many samples there are. The next batch is checked again."""
    model, batches = model_and_batches([4, 4])
    accumulator = limpet.FisherAccumulator(model, loss=lambda o, y: o[:, 0] / len(o))
    for batch in batches:
        with pytest.raises(RuntimeError, match="mixes samples: in batch 0"):
            accumulator.add(batch)


class Breaks(nn.Module):
    """Its backward can break between the last layer and the first."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.head, self.broken, self.calls = first, nn.Linear(4, CLASSES), 0, 0

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        if self.broken and torch.is_grad_enabled() and x.shape[0] in (1, 5):  # not where the probe looks
            h.register_hook(self.fail)
        return self.head(h)

    def fail(self, grad: Tensor) -> None:
        self.calls += 1
        if self.calls == self.broken:
            raise KeyboardInterrupt


@pytest.mark.parametrize("labels", ["data", "expected"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])  # the first ones may check the rows, and sum nothing yet
@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("first", [nn.Linear, HiddenLinear], ids=["fused", "per sample"])
def test_a_batch_that_is_interrupted_is_not_counted_in_part(
    first: type[nn.Linear], before: int, call: int, labels: str
) -> None:
    torch.manual_seed(0)
    model = Breaks(first(4, 4))
    batches = [(torch.randn(5, 4), torch.randint(CLASSES, (5,))) for _ in range(before + 1)]
    accumulator = accumulated(model, batches[:-1], labels=labels)
    state = accumulator.state_dict()
    model.broken = call
    try:
        accumulator.add(batches[-1])
    except KeyboardInterrupt:
        model.broken = 0
        torn = accumulator._torn is not None
        if torn:
            for use in (accumulator.fisher, accumulator.state_dict, lambda: accumulator.add(batches[0])):
                with pytest.raises(RuntimeError, match=f"adding batch {before} was interrupted"):
                    use()
            with pytest.raises(RuntimeError, match="was interrupted"):
                limpet.FisherAccumulator(model, labels=labels).merge(accumulator)
            accumulator.load_state_dict(state)
        accumulator.add(batches[-1])
    model.broken = 0
    assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches, labels=labels), 1e-6)


def test_an_interruption_between_two_sums_tears_the_batch() -> None:
    model = Breaks(nn.Linear(4, 4))
    batches = [(torch.randn(5, 4), torch.randint(CLASSES, (5,))) for _ in range(2)]
    accumulator = accumulated(model, batches[:1])
    model.broken = 1
    with pytest.raises(KeyboardInterrupt):
        accumulator.add(batches[1])
    with pytest.raises(RuntimeError, match="adding batch 1 was interrupted"):
        accumulator.fisher()


def test_a_model_that_changes_its_buffer_later() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.counts = nn.Linear(4, CLASSES), False
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            if self.counts:
                self.steps += 1
            return self.linear(x)

    _, batches = model_and_batches([3, 3])
    model = Counting()
    accumulator = accumulated(model, batches[:1])
    model.counts = True
    with pytest.raises(RuntimeError, match="changes its buffer 'steps'"):
        accumulator.add(batches[1])
    assert model.steps == 0
    model.counts = False
    accumulator.add(batches[1])  # nothing of it had counted
    assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches), 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m[1].weight.requires_grad_(False), "parameter '1.weight' is not the one that it was"),
        (lambda m: m.append(nn.Linear(CLASSES, CLASSES)), "parameter '4.weight' is not the one that it was"),
        (lambda m: setattr(m[1], "bias", nn.Parameter(torch.zeros(6))), "parameter '1.bias' is not the one"),
        (lambda m: m.double(), "parameter '1.weight' has sums in torch.float32 on cpu, and is now a torch.float64"),
    ],
)
def test_parameters_stay(change: Callable[[nn.Module], Any], words: str) -> None:
    model, batches = model_and_batches([3])
    accumulator = accumulated(model, batches)
    before = accumulator.fisher()
    change(model)
    with pytest.raises(RuntimeError, match=words):
        accumulator.add(batches[0])
    assert_same(accumulator.fisher(), before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"labels": "true"}, ValueError, "labels must be one of"),
        ({"loss": "mse"}, TypeError, "loss must be callable"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_options(options: Mapping[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        limpet.FisherAccumulator(mlp(4, 2), **options)


# --- gradients that are not finite -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "largest", "where"),
    [
        (0, 1 << 16, "batch 0"),
        (5, 1 << 16, "batch 5"),
        (8, 1 << 16, "batch 8"),
        (0, 0, "batch 0"),
        (5, 0, "one of the batches 1 to 5"),  # when it is read
        (8, 0, "one of the batches 1 to 8"),
        (15, 0, "one of the batches 9 to 15"),  # before it goes to the totals
    ],
)
def test_gradients_that_are_not_finite(before: int, largest: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the batch itself where the tensor is small, and every eighth batch where it is not."""
    monkeypatch.setattr(sums, "_SMALL", largest)
    monkeypatch.setattr(sums, "_FLUSH", 16)
    torch.manual_seed(0)
    good, bad = (torch.ones(1, 4), torch.tensor([0])), (torch.zeros(1, 4), torch.tensor([0]))
    batches = [good] * before + [bad] + [good] * (before == 15)
    with pytest.raises(RuntimeError, match=rf"the squared gradient of 'first.weight' is not finite in {where}$"):
        accumulated(Rooted(), batches).fisher()
