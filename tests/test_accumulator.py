"""``FisherAccumulator``: streamed, merged, saved and resumed, and summed over processes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.nn.parallel import DistributedDataParallel

import limpet
from cases import CLASSES, mlp
from limpet.fisher import computation, sums
from limpet.fisher.labels import LABELS

pytestmark = pytest.mark.filterwarnings("ignore:labels='batched' squares:UserWarning")


def model_and_batches(sizes: list[int], dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return mlp(4, 6, CLASSES).to(dtype), [(torch.randn(n, 4, dtype=dtype), torch.randint(CLASSES, (n,))) for n in sizes]


def accumulated(model: nn.Module, batches: list[Any], **options: Any) -> limpet.FisherAccumulator:
    accumulator = limpet.FisherAccumulator(model, **options)
    for batch in batches:
        accumulator.add(batch)
    return accumulator


def assert_same(got: limpet.DiagonalFisher, want: limpet.DiagonalFisher, bound: float = 0.0) -> None:
    assert (got.num_samples, got.routes, list(got)) == (want.num_samples, want.routes, list(want))
    for name, value in want.items():
        assert (got[name] - value).abs().max() <= bound * value.abs().max(), name


# --- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", LABELS)
def test_the_same_as_all_batches_at_once(labels: str) -> None:
    model, batches = model_and_batches([5, 1, 4])
    accumulator = accumulated(model, batches, labels=labels, seed=3)
    assert accumulator.num_samples == 10
    assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches, labels=labels, seed=3))


def test_reading_it_changes_nothing() -> None:
    model, batches = model_and_batches([3, 4])
    accumulator = limpet.FisherAccumulator(model)
    for done, batch in enumerate(batches):
        accumulator.add(batch)
        assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches[: done + 1]))
        accumulator.fisher()["1.weight"].zero_()
    assert_same(accumulator.fisher(), limpet.diagonal_fisher(model, batches))
    assert repr(accumulator) == "FisherAccumulator(4 parameters, labels='data'; 7 samples)"


def test_only_the_first_batch_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = model_and_batches([3, 3, 3])
    accumulator = accumulated(model, batches[:1])
    monkeypatch.setattr(computation, "Probe", lambda *_: pytest.fail("probed again"))
    for batch in batches[1:]:
        accumulator.add(batch)
    assert accumulator.num_samples == 9


def test_nothing_added() -> None:
    accumulator = limpet.FisherAccumulator(mlp(4, 2))
    with pytest.raises(RuntimeError, match="add a batch first"):
        accumulator.fisher()


# --- saving and resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("flush", [2, 256])
def test_resumed_bit_for_bit(labels: str, flush: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_FLUSH", flush)
    model, batches = model_and_batches([4, 3, 5, 4, 2, 3])
    want = accumulated(model, batches, labels=labels, seed=7).fisher()
    file = io.BytesIO()
    torch.save(accumulated(model, batches[:3], labels=labels, seed=7).state_dict(), file)
    file.seek(0)
    resumed = limpet.FisherAccumulator(model, labels=labels)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.num_samples == 12
    for batch in batches[3:]:
        resumed.add(batch)
    assert_same(resumed.fisher(), want)


def test_a_state_does_not_change_with_later_batches() -> None:
    model, batches = model_and_batches([4, 3])
    accumulator = accumulated(model, batches[:1])
    want, state = accumulator.fisher(), accumulator.state_dict()
    accumulator.add(batches[1])
    accumulator.load_state_dict(state)
    accumulator.add(batches[1])
    accumulator.load_state_dict(state)  # not even through what was loaded from it
    assert_same(accumulator.fisher(), want)


class HiddenLinear(nn.Linear):
    """A linear layer that no rule can see: its weight goes the per-sample way."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            x, weight = ctx.saved_tensors
            return grad @ weight, grad.T @ x

    def forward(self, x: Tensor) -> Tensor:
        return self.Function.apply(x, self.weight) + self.bias


class Positions(nn.Module):
    """A parameter shared by the samples: its per-sample gradients are formed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = HiddenLinear(4, CLASSES), nn.Embedding(3, 4)

    def forward(self, x: Tensor) -> Tensor:  # [N, 3, 4]
        return self.linear((x + self.table(torch.arange(3))).square().sum(dim=1))


def test_routes_are_kept() -> None:
    torch.manual_seed(0)
    model, batch = Positions(), (torch.randn(4, 3, 4), torch.randint(CLASSES, (4,)))
    accumulator, other = accumulated(model, [batch]), limpet.FisherAccumulator(model)
    assert accumulator.fisher().routes["linear.weight"] == "per_sample"
    assert set(accumulator.fisher().routes.values()) == {"per_sample", "materialised", "fused"}
    other.load_state_dict(accumulator.state_dict())
    assert other.fisher().routes == accumulator.fisher().routes
    merged = limpet.FisherAccumulator(model)
    merged.merge(accumulator)
    assert merged.fisher().routes == accumulator.fisher().routes


# --- merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["data", "expected", "batched"])
@pytest.mark.parametrize("by_state", [False, True])
def test_merged(labels: str, by_state: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_FLUSH", 2)
    model, batches = model_and_batches([4, 3, 5, 1, 2], torch.float64)
    one, other = (accumulated(model, part, labels=labels) for part in (batches[:2], batches[2:4]))
    before = other.fisher()
    one.merge(other.state_dict() if by_state else other)
    one.add(batches[4])
    assert_same(one.fisher(), accumulated(model, batches, labels=labels).fisher(), 1e-12)
    assert_same(other.fisher(), before)


def test_merged_with_itself_and_with_nothing() -> None:
    model, batches = model_and_batches([4])
    accumulator = accumulated(model, batches)
    accumulator.merge(limpet.FisherAccumulator(model))
    accumulator.merge(accumulator)
    want = accumulated(model, batches * 2).fisher()
    assert_same(accumulator.fisher(), want)


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, bool, bool]]:
    """How samples arrive: so many, to the accumulator at hand or to a new one, that is saved and loaded or not."""
    return draw(st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.booleans()), min_size=1, max_size=6))


@settings(max_examples=25)
@given(histories(), st.sampled_from(["data", "expected"]), st.integers(1, 3))
def test_any_history_gives_the_same(history: list[tuple[int, bool, bool]], labels: str, flush: int) -> None:
    model, batches = model_and_batches([size for size, _, _ in history], torch.float64)
    accumulators = [limpet.FisherAccumulator(model, labels=labels)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_FLUSH", flush)
        for batch, (_, elsewhere, saved) in zip(batches, history, strict=True):
            if elsewhere:
                accumulators.append(limpet.FisherAccumulator(model, labels=labels))
            if saved:
                state = accumulators.pop().state_dict()
                accumulators.append(limpet.FisherAccumulator(model, labels=labels))
                accumulators[-1].load_state_dict(state)
            accumulators[-1].add(batch)
        while len(accumulators) > 1:
            accumulators[-2].merge(accumulators.pop())
    whole = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert_same(accumulators[0].fisher(), limpet.diagonal_fisher(model, [whole], labels=labels), 1e-12)


# --- refused ---------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state | changes


STATES: list[tuple[Callable[[dict[str, Any]], Any], type[Exception], str]] = [
    (lambda state: [1], TypeError, "{} must be a state_dict of a FisherAccumulator, got list"),
    (lambda state: {"labels": "data"}, ValueError, "{} must have the keys"),
    (changed(labels="sampled"), ValueError, "{} must hold sums for labels='data', got str 'sampled'"),
    (changed(seed=-1), ValueError, "{}['seed'] must be at least 0"),
    (changed(num_samples=1.5), TypeError, "{}['num_samples'] must be an integer"),
    (changed(num_batches=-1), ValueError, "{}['num_batches'] must be at least 0"),
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
    with pytest.raises(RuntimeError, match="adding batch 1 was interrupted"):
        accumulator.fisher()


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


class Rooted(nn.Module):
    """The first layer's gradient is infinite where its output is zero; the head's stays finite."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.where(h.detach() == 0, h.abs().sqrt(), h))


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


# --- several processes -----------------------------------------------------------------------------------------------

SIZES = [[4, 3, 2], [5]]  # each process's batches


def in_each_process(rank: int, rendezvous: str, folder: str) -> None:
    """What a process does; what it found goes to a file."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    group = distributed.group.WORLD
    assert group is not None
    found: dict[str, Any] = {}

    def error(use: Callable[[], Any]) -> str:
        try:
            use()
        except (TypeError, ValueError, RuntimeError) as caught:
            return f"{type(caught).__name__}: {caught}"
        return ""

    model, batches = model_and_batches(SIZES[0] + SIZES[1], torch.float64)
    mine = batches[:3] if rank == 0 else batches[3:]
    accumulator = accumulated(model, mine)
    for label, fisher in (("all", accumulator.fisher(group)), ("again", accumulator.fisher(group))):
        found[label] = dict(fisher), fisher.num_samples, fisher.routes
    found["alone"] = accumulator.fisher().num_samples

    one = accumulated(model, mine if rank == 0 else []).fisher(group)  # the other process has nothing to add
    found["one"] = dict(one), one.num_samples, one.routes
    found["none"] = error(lambda: limpet.FisherAccumulator(model).fisher(group))
    found["labels"] = error(lambda: limpet.FisherAccumulator(model, labels=LABELS[rank]).fisher(group))
    found["shapes"] = error(lambda: limpet.FisherAccumulator(mlp(4, 6 + rank)).fisher(group))
    found["group"] = error(lambda: accumulator.fisher("gloo"))  # type: ignore[arg-type]
    rooted = limpet.FisherAccumulator(Rooted())
    found["bad"] = error(lambda: rooted.add((torch.ones(1, 4) - rank, torch.tensor([0]))))
    found["interrupted"] = error(lambda: rooted.fisher(group))
    found["wrapped"] = error(lambda: limpet.diagonal_fisher(DistributedDataParallel(model), mine))
    sharded = distribute_module(mlp(4, 6), init_device_mesh("cpu", (2,)))
    found["sharded"] = error(lambda: limpet.FisherAccumulator(sharded))
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("group")
    multiprocessing.spawn(in_each_process, (f"file://{folder / 'rendezvous'}", str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_sum_over_processes(processes: list[dict[str, Any]]) -> None:
    model, batches = model_and_batches(SIZES[0] + SIZES[1], torch.float64)
    for found in processes:
        for label, part in (("all", batches), ("again", batches), ("one", batches[:3])):
            assert_same(limpet.DiagonalFisher(*found[label]), limpet.diagonal_fisher(model, part), 1e-12)
    assert [found["alone"] for found in processes] == [9, 5]


def test_every_process_hears_of_errors(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert "RuntimeError: there is no Fisher information of no samples" in found["none"]
        assert "ValueError: the processes of the group must have the same labels and parameters" in found["labels"]
        assert "process 1 has 'sampled'" in found["labels"]
        assert "ValueError: the processes of the group must have the same labels and parameters" in found["shapes"]
        assert found["group"] == "TypeError: group must be a process group of this process, got str 'gloo'"
        assert "RuntimeError: process 1 of the group: adding batch 0 was interrupted" in found["interrupted"]
    assert processes[0]["bad"] == ""
    assert "the squared gradient of 'first.weight' is not finite in batch 0" in processes[1]["bad"]


def test_a_wrapped_or_sharded_model_is_refused(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert "TypeError: model must not be wrapped in DistributedDataParallel" in found["wrapped"]
        assert "give model.module" in found["wrapped"]
        assert found["sharded"].startswith("TypeError: parameter '1.weight' must not be sharded over processes")
