"""Batches whose calls an earlier batch had: the core takes them, and adds small linear layers' squares together."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
from cases import CASES, CLASSES, Case
from limpet import _core
from limpet.fisher.plans import _HELD
from limpet.ops import _fisher_launch
from test_diagonal_fisher import assert_fisher, double, one_by_one
from test_zoo import ENTRIES
from zoo import Entry, assert_exact, in_dtype

BATCH = 4


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each batch whose layers' squares were added together, how many layers there were."""
    counts: list[int] = []
    add = _core.CallTaker.add

    def counted(taker: _core.CallTaker, output_grads: list[Tensor]) -> None:
        counts.append(len(output_grads))
        add(taker, output_grads)

    monkeypatch.setattr(_core.CallTaker, "add", counted)
    monkeypatch.setattr("limpet.fisher.plans._HELD", 100.0)
    return counts


class Written(nn.Module):
    """A network of layers, whose forward is given."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def network(*between: nn.Module, bias: bool = True) -> nn.Sequential:
    """Wide layers: their inputs and output gradients are small beside them."""
    layers = [nn.Linear(6, 48, bias=bias), *between, nn.Linear(48, 40, bias=bias), *between, nn.Linear(40, CLASSES)]
    return nn.Sequential(*layers)


def batches(count: int, *places: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(BATCH, *places, 6), torch.randint(CLASSES, (BATCH,))) for _ in range(count)]


def assert_agrees(model: nn.Module, pairs: list[tuple[Any, Any]], bound: float = 1e-5) -> None:
    got = limpet.diagonal_fisher(model, pairs)
    want = one_by_one(model.double(), [double(pair) for pair in pairs])
    model.float()
    assert_fisher(got, want, bound)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_batches_of_one_size_agree_with_the_loop(case: Case) -> None:
    torch.manual_seed(0)
    model = case.make_model().double()
    pairs = [double(case.make_batch(3)) for _ in range(3)]
    assert_fisher(limpet.diagonal_fisher(model, pairs), one_by_one(model, pairs), 1e-10)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")  # torch's own
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_batches_that_come_again_change_no_mean(entry: Entry) -> None:
    torch.manual_seed(0)
    model, once = entry.make_model().double(), in_dtype(entry.make_batches(), torch.float64)
    again = [pair for pair in once for _ in range(2)]
    want = limpet.diagonal_fisher(model, once, loss=entry.loss)
    assert_exact(limpet.diagonal_fisher(model, again, loss=entry.loss), want, torch.float64)


@pytest.mark.parametrize("name", ["plain", "changed in place", "without biases", "frozen bias", "frozen weight"])
def test_small_layers_are_added_together(name: str, added: list[int]) -> None:
    torch.manual_seed(0)
    model = network(nn.ReLU(inplace=name == "changed in place"), bias=name != "without biases")
    if name == "frozen bias":
        model[2].bias.requires_grad_(False)
    if name == "frozen weight":
        model[2].weight.requires_grad_(False)
    assert_agrees(model, batches(3))
    assert added == [2 if name == "frozen weight" else 3] * 2


@pytest.mark.parametrize("in_place", [False, True])
def test_places(in_place: bool, added: list[int]) -> None:
    torch.manual_seed(0)
    model = Written(
        lambda m, x: m.layers(x).sum(dim=1), layers=network(nn.ReLU(inplace=in_place)), more=nn.Linear(CLASSES, CLASSES)
    )
    model.more.requires_grad_(False)
    assert_agrees(model, batches(3, 3))
    assert added == [3] * 2


@pytest.mark.parametrize(("samples", "together"), [(3, True), (40, False)])
def test_large_activations_are_not_held(
    samples: int, together: bool, added: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("limpet.fisher.plans._HELD", _HELD)
    pairs = [(torch.randn(samples, 6), torch.randint(CLASSES, (samples,))) for _ in range(3)]
    assert_agrees(network(nn.ReLU()), pairs)
    assert bool(added) == together


def test_tensors_that_the_core_cannot_read(added: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the sums are formed the way of all others."""
    from limpet.fisher import recorder

    recorder._filter.cache_clear()
    monkeypatch.setattr(recorder, "add_plain_linear", lambda *_: False)
    try:
        assert_agrees(network(nn.ReLU()), batches(3))
    finally:
        recorder._filter.cache_clear()
    assert added == [3] * 2


def together_and_apart(model: nn.Module, pairs: list[Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    together = limpet.diagonal_fisher(model, pairs)
    monkeypatch.setattr("limpet.fisher.plans._HELD", -1.0)
    return together, limpet.diagonal_fisher(model, pairs)


def test_the_bits_are_the_same(added: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """So a resumed accumulator, which begins with a careful batch, goes on bit for bit."""
    together, apart = together_and_apart(network(nn.ReLU()), batches(3), monkeypatch)
    assert len(added) == 2
    for name, value in together.items():
        assert torch.equal(value, apart[name])


def test_parameters_that_lie_elsewhere_now(added: list[int]) -> None:
    """An optimizer may have put a new tensor behind each parameter."""
    torch.manual_seed(0)
    model, pairs = network(nn.ReLU()), batches(3)
    accumulator = limpet.FisherAccumulator(model)
    want = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for pair in pairs:
        accumulator.add(pair)
        for name, value in one_by_one(model, [pair]).items():
            want[name] += value / len(pairs)
        for p in model.parameters():
            p.data = p.data + torch.randn_like(p) / 10
    assert_fisher(accumulator.fisher(), want, 1e-5)
    assert added == [3] * 2


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    "later", ["no_grad", "twice", "twice, not once", "another order", "bfloat16", "by name", "a view"]
)
def test_later_batches_of_other_calls(
    later: str, together: bool, added: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr("limpet.fisher.plans._HELD", -1.0)
    torch.manual_seed(0)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h, other = torch.tanh(m.first(x)), m.training
        if other and later == "no_grad":
            with torch.no_grad():
                h = torch.tanh(m.first(x))
        if other and later == "twice":
            h = torch.tanh(m.second(h))
        if other and later == "twice, not once":
            return m.head(torch.tanh(m.second(torch.tanh(m.second(x.repeat(1, 8))))))
        if other and later == "another order":
            return m.head(torch.tanh(F.linear(x.repeat(1, 8), m.second.weight, m.second.bias)))
        if other and later == "bfloat16":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return m.head(torch.tanh(m.second(h))).float()
        if other and later == "by name":
            return m.head(torch.tanh(F.linear(h, weight=m.second.weight, bias=m.second.bias)))
        if other and later == "a view":
            return m.head(torch.tanh(F.linear(h, m.second.weight[:], m.second.bias)))
        return m.head(torch.tanh(m.second(h)))

    model = Written(forward, first=nn.Linear(6, 48), second=nn.Linear(48, 48), head=nn.Linear(48, CLASSES))
    accumulator = limpet.FisherAccumulator(model)
    want = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for training in (False, False, True, True, False, False):
        (pair,) = batches(1)
        model.train(training)
        accumulator.add(pair)
        for name, value in one_by_one(model, [pair]).items():
            want[name] += value / 6
    assert_fisher(accumulator.fisher(), want, 3e-2 if later == "bfloat16" else 1e-5)
    assert (len(added) > 1) == together


def test_alternating_sizes(added: list[int]) -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(n, 6), torch.randint(CLASSES, (n,))) for n in (4, 3, 4, 3, 3, 4, 4)]
    assert_agrees(network(nn.ReLU()), pairs)
    assert added


def test_inputs_that_require_a_gradient(added: list[int]) -> None:
    torch.manual_seed(0)
    pairs = [(x.requires_grad_(), y) for x, y in batches(3)]
    assert_agrees(network(nn.ReLU()), pairs)
    assert added == [3] * 2
    assert all(x.grad is None for x, _ in pairs)


def test_a_layer_that_the_loss_does_not_depend_on(added: list[int]) -> None:
    torch.manual_seed(0)
    model = Written(lambda m, x: (m.unused(x), m.layers(x))[1], layers=network(nn.ReLU()), unused=nn.Linear(6, 5))
    accumulator = limpet.FisherAccumulator(model)
    for pair in batches(3):
        accumulator.add(pair)
    fisher = accumulator.fisher()
    assert not fisher["unused.weight"].any()
    assert fisher["layers.0.weight"].any()
    assert added == [4] * 2


def test_an_input_that_is_changed_afterwards(added: list[int]) -> None:
    torch.manual_seed(0)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        y = m.second(h)
        if x[0, 0] > 50:
            with torch.no_grad():
                h.zero_()
        return y

    model = Written(forward, first=nn.Linear(6, 48), second=nn.Linear(48, CLASSES))
    pairs = batches(3)
    pairs[2][0][0, 0] = 100.0
    accumulator = limpet.FisherAccumulator(model)
    for pair in pairs[:2]:
        accumulator.add(pair)
    with pytest.raises(RuntimeError, match="inplace operation"):
        accumulator.add(pairs[2])
    assert added


def test_a_gradient_that_is_not_finite(added: list[int]) -> None:
    torch.manual_seed(0)
    root = Written(
        lambda m, x: m.second(m.first(x).abs().sqrt()), first=nn.Linear(6, 48), second=nn.Linear(48, CLASSES)
    )
    pairs = batches(3)
    accumulator = limpet.FisherAccumulator(root)
    for pair in pairs[:2]:
        accumulator.add(pair)
    with torch.no_grad():
        root.first.weight[0] = 0.0
        root.first.bias[0] = 0.0
    with pytest.raises(RuntimeError, match=r"squared gradient of 'first\..*' is not finite in batch 2"):
        accumulator.add(pairs[2])
    assert added


def test_nothing_of_a_batch_is_held(added: list[int]) -> None:
    torch.manual_seed(0)
    seen: list[weakref.ref[Tensor]] = []

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(m.first(x))
        seen.append(weakref.ref(h))
        if x[0, 0] > 50:
            raise ValueError("stop")
        return m.second(h)

    model = Written(forward, first=nn.Linear(6, 48), second=nn.Linear(48, CLASSES))
    accumulator = limpet.FisherAccumulator(model)
    gc.collect()
    gc.disable()
    try:
        for x, y in batches(3):
            accumulator.add((x, y))
        x[0, 0] = 100.0
        with pytest.raises(ValueError, match="stop"):
            accumulator.add((x, y))
    finally:
        gc.enable()
    assert added == [2] * 2
    assert not any(h() is not None for h in seen[:-1])
    gc.collect()
    assert seen[-1]() is None


def test_expected_labels_take_columns_one_by_one(added: list[int]) -> None:
    torch.manual_seed(0)
    model, pairs = network(nn.ReLU()), batches(3)
    got = limpet.diagonal_fisher(model, pairs, labels="expected")
    apart = [limpet.diagonal_fisher(model, [pair], labels="expected") for pair in pairs]
    for name, value in got.items():
        torch.testing.assert_close(value, sum(one[name] for one in apart) / len(pairs), rtol=1e-5, atol=1e-9)
    assert not added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_surely_finite(dtype: torch.dtype) -> None:
    surely = _fisher_launch.surely_finite
    largest = torch.finfo(dtype).max
    assert surely(torch.tensor([0.0, -largest, largest, torch.finfo(dtype).tiny], dtype=dtype))
    assert surely(torch.zeros(0, dtype=dtype))
    for value in ("nan", "inf", "-inf"):
        for place in (0, 17, 32):
            values = torch.randn(33, dtype=dtype)
            values[place] = float(value)
            assert not surely(values)
    assert not surely(torch.randn(4, 4, dtype=dtype)[:, 0])  # no answer


def test_what_is_surely_the_same() -> None:
    state = torch.get_rng_state()
    other = state.clone()
    assert _fisher_launch.surely_same(state, other)
    other[-1] += 1
    assert not _fisher_launch.surely_same(state, other)
    assert not _fisher_launch.surely_same(state, state[1:])
    assert not _fisher_launch.surely_same(state, state.to(torch.int16))


def test_a_scripted_model():
    """Its modules' collections are no dicts, and none of its functions is seen."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    batches = [(torch.randn(6, 4), torch.randint(3, (6,))) for _ in range(3)]
    accumulator = limpet.FisherAccumulator(torch.jit.script(model))
    for batch in batches:
        accumulator.add(batch)
    assert_fisher(accumulator.fisher(), one_by_one(model, batches), 1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_a_first_layer_with_and_without_a_graph(added: list[int], enabled: bool):
    """The value of a first layer is no leaf: it may be changed in place, and has no graph under no_grad."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            with torch.set_grad_enabled(enabled):
                h = self.first(x)
            assert h.requires_grad == enabled
            return self.second(h.mul_(2.0).relu_())

    model = Model()
    batches = [(torch.randn(BATCH, 4), torch.randint(3, (BATCH,))) for _ in range(3)]
    accumulator = limpet.FisherAccumulator(model)
    for batch in batches:
        accumulator.add(batch)
    assert added == [1 + enabled] * 2
    assert_fisher(accumulator.fisher(), one_by_one(model, batches), 1e-5)
