"""``diagonal_fisher`` in mixed and half precision, against ordinary passes of single samples in the same precision."""

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import limpet
from cases import ResNet18, mlp, with_statistics
from limpet.fisher.precision import without_tf32


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(192, 5))


MODELS = {
    "mlp": (lambda: mlp(20, 64, 64, 5), (20,)),
    "resnet": (lambda: with_statistics(ResNet18(5, width=8)), (3, 16, 16)),
    "encoder": (encoder, (6, 32)),
    "lstm": (lambda: LastOutput(), (6, 8)),
}


class LastOutput(nn.Module):
    """An LSTM with a head on its last output, and a position parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 5)
        self.position = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x + self.position)[0][:, -1])


def loop(model: nn.Module, x: Tensor, y: Tensor, precision: contextlib.AbstractContextManager[object], scale: float):
    """Single samples, forward under ``precision``, with the loss scaled."""
    params = dict(model.named_parameters())
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()}
    for n in range(len(x)):
        with precision:
            loss = scale * F.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for total, grad in zip(sums.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            total += (grad.double() / scale).square()
    return {name: total / len(x) for name, total in sums.items()}


def error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    return max(
        float((got[name].double() - value).norm() / value.norm())
        for name, value in want.items()
        if value.norm() > 1e-12
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16) for name in MODELS]
    + [(name, torch.float16) for name in MODELS if name != "lstm"],  # torch's own LSTM has no float16 on the CPU
)
def test_autocast_is_as_close_to_float64_as_ordinary_passes(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().eval()
    x, y = torch.randn(7, *shape), torch.randint(5, (7,))
    with torch.autocast("cpu", dtype):
        fisher = limpet.diagonal_fisher(model, [(x, y)])
    ordinary = loop(model, x, y, torch.autocast("cpu", dtype), 1024.0)
    exact = loop(model.double(), x.double(), y, contextlib.nullcontext(), 1.0)
    assert all(value.dtype == torch.float32 for value in fisher.values())
    assert set(fisher.routes.values()) == {"fused"}
    assert error(fisher, exact) <= 2 * error(ordinary, exact)


def test_autocast_of_parameters_that_go_per_sample() -> None:
    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.centres = nn.Linear(4, 6), nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            rows = self.body(x).to(self.centres.dtype)
            return -torch.cat([torch.cdist(row, self.centres) for row in rows.split(1)])

    torch.manual_seed(0)
    model, x, y = Distances(), torch.randn(7, 4), torch.randint(5, (7,))
    with torch.autocast("cpu", torch.bfloat16):
        fisher = limpet.diagonal_fisher(model, [(x, y)])
    assert fisher.routes["centres"] == "per_sample"
    exact = loop(model.double(), x.double(), y, contextlib.nullcontext(), 1.0)
    assert error(fisher, exact) <= 0.05


@pytest.mark.parametrize("size", [1e-7, 1.0, 1e4])
def test_float16_gradients_neither_vanish_nor_overflow(size: float) -> None:
    torch.manual_seed(0)
    model, x, y = mlp(20, 64, 5), torch.randn(7, 20), torch.randint(5, (7,))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return size * F.cross_entropy(outputs.float(), targets, reduction="none")

    with torch.autocast("cpu", torch.float16):
        fisher = limpet.diagonal_fisher(model, [(x, y)], loss=loss)
    exact = loop(model.double(), x.double(), y, contextlib.nullcontext(), 1.0)
    assert error({name: value.double() / size**2 for name, value in fisher.items()}, exact) <= 0.05


def test_products_are_ieee_on_a_gpu() -> None:
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        with without_tf32(torch.device("cuda")):
            assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
        assert [place.fp32_precision for place in places] == ["tf32", "tf32"]
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value
