"""What a later batch asks of its device: one reading, whatever the model, and no kernel for each buffer."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import limpet
from cases import CLASSES, ResNet18, mlp, with_statistics
from limpet.fisher import reading
from limpet.ops import _fisher_launch

READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero")
VIEWS = ("view", "detach", "reshape", "unsqueeze", "squeeze", "alias")


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way taken on a GPU: sums are looked at when the next loss is, and every op goes by the dispatcher."""
    monkeypatch.setattr(reading, "waits", lambda device: True)
    monkeypatch.setattr(_fisher_launch, "_PLAIN", None)


class Calls(TorchDispatchMode):
    """Counts the calls of torch's functions by name; those that read the device as reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.reads = 0
        tolist = Tensor.tolist

        def counted(tensor: Tensor) -> Any:
            self.reads += 1
            return tolist(tensor)

        monkeypatch.setattr(Tensor, "tolist", counted)  # which goes past the dispatcher on the CPU

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        of_the_host = name == "equal" and args[0].dtype == torch.uint8  # states of random number generators
        self.reads += name in READS and not of_the_host
        return func(*args, **(kwargs or {}))


def calls(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> Calls:
    with monkeypatch.context() as patch, Calls(patch) as counted:
        run()
    return counted


def token_losses(outputs: Any, ids: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.transpose(1, 2), ids, reduction="none").sum(dim=1)


def network(name: str) -> tuple[nn.Module, Any, Any]:
    """The model, a batch, the loss."""
    labels = torch.randint(CLASSES, (4,))
    if name == "mlp":
        return mlp(6, 8, CLASSES), (torch.randn(4, 6), labels), None
    if name == "resnet":
        return with_statistics(ResNet18(CLASSES, width=4)), (torch.randn(4, 3, 8, 8), labels), None
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(20, (3, 5))
    return transformers.GPT2LMHeadModel(config).eval(), ({"input_ids": ids}, ids), token_losses


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt2"])
def test_a_later_batch_is_read_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, batch, loss = network(name)
    accumulator = limpet.FisherAccumulator(model, loss=loss)
    for _ in range(2):
        accumulator.add(batch)
    inputs = batch[0]
    ordinary = calls(monkeypatch, lambda: model(**inputs) if isinstance(inputs, dict) else model(inputs))
    for _ in range(8):  # one of which looks at every sum
        later = calls(monkeypatch, lambda: accumulator.add(batch))
        assert later.reads - ordinary.reads == 1


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_buffers_cost_no_kernel_each(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(4, 3), torch.randint(CLASSES, (4,))
    launches = []
    for count in (1, 30):
        model = nn.Linear(3, CLASSES)
        for n in range(count):
            model.register_buffer(f"one{n}", torch.randn(n, 2))
            model.register_buffer(f"other{n}", torch.tensor(n))
        accumulator = limpet.FisherAccumulator(model)
        for _ in range(2):
            accumulator.add(batch)
        names = calls(monkeypatch, lambda accumulator=accumulator: accumulator.add(batch)).names
        launches.append({name: n for name, n in names.items() if name not in VIEWS})
    assert launches[0] == launches[1]


# --- errors that are found when the next loss is read ----------------------------------------------------------------


class Root(nn.Module):
    """A root of the first layer's output, whose gradient is infinite for zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6, bias=False), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).square().sqrt())


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("before", [1, 8])
@pytest.mark.parametrize("use", ["add", "fisher", "state_dict", "a batch that is refused, and fisher"])
def test_a_gradient_that_is_not_finite(use: str, before: int) -> None:
    torch.manual_seed(0)
    good, bad = ((x, torch.tensor([0])) for x in (torch.ones(1, 4), torch.zeros(1, 4)))
    accumulator = limpet.FisherAccumulator(Root())
    for batch in [good] * before + [bad]:
        accumulator.add(batch)
    if use.startswith("a batch"):
        with pytest.raises(RuntimeError, match="shape"):
            accumulator.add((torch.ones(1, 3), torch.tensor([0])))
        use = "fisher"
    for _ in range(2):  # it stays as it is
        with pytest.raises(RuntimeError, match=rf"gradient of 'first.weight' is not finite in batch {before}$"):
            accumulator.add(good) if use == "add" else getattr(accumulator, use)()


# --- buffers ---------------------------------------------------------------------------------------------------------


class Writes(nn.Module):
    """Does something to its buffers, from forward or from backward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)
        self.write: Callable[[Writes], object] | None = None
        self.in_backward = False
        self.register_buffer("values", torch.tensor([[0.0, 1.0], [torch.nan, -2.0]], dtype=torch.bfloat16).t())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("complex", torch.ones(2, dtype=torch.complex64))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.in_backward:
            y.register_hook(self.do)
        else:
            self.do()
        return y

    def do(self, grad: Tensor | None = None) -> None:
        if self.write is not None:
            self.write(self)


CHANGES: dict[str, Callable[[Writes], object]] = {
    "values": lambda m: m.values.data[0, 0].fill_(-0.0),  # the sign of a zero; past the tensor's version
    "steps": lambda m: m.steps.add_(1),
    "flags": lambda m: setattr(m, "flags", m.flags.clone()),
    "complex": lambda m: m.complex.mul_(2),
}


@pytest.mark.parametrize(
    ("name", "batches", "in_backward"),
    [
        *itertools.product(CHANGES, [0, 1, 2], [False]),
        *itertools.product(sorted(CHANGES.keys() - {"values"}), [0, 1, 2], [True]),
        ("values", 0, True),  # later, what backward writes is seen by the tensors' versions alone
    ],
)
def test_a_buffer_that_is_changed_comes_back(name: str, batches: int, in_backward: bool) -> None:
    model = Writes()
    batch = torch.randn(3, 4), torch.randint(CLASSES, (3,))
    accumulator = limpet.FisherAccumulator(model)
    for _ in range(batches):
        accumulator.add(batch)
    before = dict(model.named_buffers())
    bits = {key: value.clone() for key, value in before.items()}
    model.write, model.in_backward = CHANGES[name], in_backward
    with pytest.raises(RuntimeError, match=f"changes its buffer '{name}' in forward"):
        accumulator.add(batch)
    for key, value in model.named_buffers():
        assert value is before[key]
        assert torch.equal(value.reshape(-1).view(torch.uint8), bits[key].reshape(-1).view(torch.uint8))


def test_a_buffer_that_is_written_with_what_it_holds() -> None:
    model, batch = Writes(), (torch.randn(3, 4), torch.randint(CLASSES, (3,)))
    accumulator = limpet.FisherAccumulator(model)
    model.write = lambda m: m.values.copy_(m.values.clone())
    for in_backward in (False, True, True):
        model.in_backward = in_backward
        accumulator.add(batch)
    assert accumulator.num_samples == 9


def test_buffers_may_change_between_batches() -> None:
    model, batch = Writes(), (torch.randn(3, 4), torch.randint(CLASSES, (3,)))
    accumulator = limpet.FisherAccumulator(model)
    for _ in range(3):
        accumulator.add(batch)
        model.values.data.add_(1)
    assert model.values[0, 0] == 3
