"""``FisherAccumulator``: streamed, merged, saved and resumed, and summed over processes."""

from __future__ import annotations

import io
from collections.abc import Callable
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
from accumulators import HiddenLinear, Rooted, accumulated, assert_same, model_and_batches
from cases import CLASSES, mlp
from limpet.fisher import computation, sums
from limpet.fisher.labels import LABELS

pytestmark = pytest.mark.filterwarnings("ignore:labels='batched' squares:UserWarning")


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


@pytest.mark.parametrize("labels", ["data", "batched"])
def test_resumed_bit_for_bit_after_float16_has_overflowed(labels: str) -> None:
    """With the scale of the losses as it was: halved, so that what is rounded away is the same."""
    model, batches = model_and_batches([4, 3, 5])
    size = 1e3

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return size * nn.functional.cross_entropy(output.float(), target, reduction="none")

    with torch.autocast("cpu", torch.float16):
        accumulator = accumulated(model, batches[:2], labels=labels, loss=loss)
        state, size = accumulator.state_dict(), 1e-4
        assert 1 <= state["loss_scale"] < limpet.FisherAccumulator(model).state_dict()["loss_scale"]
        resumed = limpet.FisherAccumulator(model, labels=labels, loss=loss)
        resumed.load_state_dict(state)
        for one in (accumulator, resumed):
            with pytest.raises(RuntimeError, match="nan"):  # which changes nothing
                one.add((batches[2][0] * torch.nan, batches[2][1]))
            one.add(batches[2])
            assert one.state_dict()["loss_scale"] == state["loss_scale"]
    assert_same(resumed.fisher(), accumulator.fisher())


def test_a_state_does_not_change_with_later_batches() -> None:
    model, batches = model_and_batches([4, 3])
    accumulator = accumulated(model, batches[:1])
    want, state = accumulator.fisher(), accumulator.state_dict()
    accumulator.add(batches[1])
    accumulator.load_state_dict(state)
    accumulator.add(batches[1])
    accumulator.load_state_dict(state)  # not even through what was loaded from it
    assert_same(accumulator.fisher(), want)


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
