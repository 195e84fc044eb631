"""``diagonal_fisher`` against the plain loop over single samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import limpet
from cases import CASES, CLASSES, MLP, RESNET18, Case, TimeMajor, mlp, with_statistics
from limpet.fisher.row_check import RowCheck

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def one_by_one(
    model: nn.Module, batches: list[tuple[Any, Any]], loss: Callable[[Any, Any], Tensor] | None = None
) -> dict[str, Tensor]:
    """The definition: a batch of one sample at a time, its gradient squared, and the mean; in float64."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in params.items()}
    samples = 0
    for inputs, targets in batches:
        for n in range(len(targets)):
            if isinstance(inputs, dict):
                output = model(**{key: value[n : n + 1] for key, value in inputs.items()})
            elif isinstance(inputs, tuple):
                output = model(*(value[n : n + 1] for value in inputs))
            else:
                output = model(inputs[n : n + 1])
            target = targets[n : n + 1]
            value = (F.cross_entropy(output, target, reduction="sum") if loss is None else loss(output, target)).sum()
            grads = torch.autograd.grad(value, list(params.values()), allow_unused=True)
            for total, grad in zip(sums.values(), grads, strict=True):
                if grad is not None:
                    total += grad.double().square()
            samples += 1
    return {name: total / samples for name, total in sums.items()}


def assert_fisher(got: Mapping[str, Tensor], want: Mapping[str, Tensor], bound: float) -> None:
    assert list(got) == list(want)
    for name, value in want.items():
        assert got[name].shape == value.shape
        error = (got[name].double() - value).abs().max().item()
        assert error <= bound * value.abs().max().item(), f"{name}: {error:.2e} against {value.abs().max().item():.2e}"


def double(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: double(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(double(value) for value in tree)
    return tree.double() if tree.is_floating_point() else tree


@pytest.mark.filterwarnings(
    "ignore:Using padding='same' with even kernel lengths:UserWarning"
)  # torch's own, in the loop
@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_the_loop(case: Case, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = case.make_model().to(dtype)
    batches = [case.make_batch(n) for n in (5, 1, 2)]  # uneven, and a single sample
    if dtype == torch.float64:
        batches = [double(batch) for batch in batches]
    fisher = limpet.diagonal_fisher(model, batches)
    assert fisher.num_samples == 8
    assert all(value.dtype == dtype for value in fisher.values())
    assert all(p.grad is None for p in model.parameters())
    want = one_by_one(model.double(), [double(batch) for batch in batches])
    assert_fisher(fisher, want, BOUND[dtype])


ROUTES = {  # the parameters that are not fused
    "repeated_conv": {"conv.weight": "materialised"},
    "language_model": {"positions.weight": "materialised"},
    "language_model_square": {"positions.weight": "materialised"},
    "language_model_tied": {"positions.weight": "materialised"},
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routes(case: Case) -> None:
    torch.manual_seed(0)
    routes = limpet.diagonal_fisher(case.make_model(), [case.make_batch(4)]).routes
    assert {name: route for name, route in routes.items() if route != "fused"} == ROUTES.get(case.name, {})


def test_resnet18() -> None:
    torch.manual_seed(0)
    model, batch = RESNET18.make_model(), RESNET18.make_batch(3)
    fisher = limpet.diagonal_fisher(model, [batch])
    assert set(fisher.routes.values()) == {"fused"}
    assert sum(value.numel() for value in fisher.values()) == 11_173_962
    assert_fisher(fisher, one_by_one(model, [batch]), BOUND[torch.float32])


def test_mlp() -> None:
    torch.manual_seed(0)
    model, batch = MLP.make_model(), MLP.make_batch(32)
    fisher = limpet.diagonal_fisher(model, [batch])
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, one_by_one(model, [batch]), BOUND[torch.float32])


def test_max_samples_cuts_the_last_batch() -> None:
    torch.manual_seed(0)
    model = mlp(4, 6, CLASSES)
    x, y = torch.randn(10, 4), torch.randint(CLASSES, (10,))
    drawn = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 10, 4):
            drawn.append(start)
            yield x[start : start + 4], y[start : start + 4]

    fisher = limpet.diagonal_fisher(model, batches(), max_samples=6)
    assert fisher.num_samples == 6
    assert drawn == [0, 4]  # no batch beyond the last one needed
    assert_fisher(fisher, one_by_one(model, [(x[:6], y[:6])]), BOUND[torch.float32])


def test_max_samples_beyond_the_data_takes_what_there_is() -> None:
    batch = torch.randn(3, 4), torch.tensor([0, 1, 2])
    assert limpet.diagonal_fisher(mlp(4, CLASSES), [batch], max_samples=9).num_samples == 3


@pytest.mark.parametrize(("shape", "total"), [("list", 7), ("loader", 7), ("generator", None)])
def test_progress(shape: str, total: int | None) -> None:
    data = [(torch.randn(4), torch.tensor(1)) for _ in range(7)]
    loader: Any = DataLoader(data, batch_size=3)  # type: ignore[arg-type]
    batches = {"list": list(loader), "loader": loader, "generator": iter(list(loader))}[shape]
    seen: list[tuple[int, int | None]] = []
    limpet.diagonal_fisher(mlp(4, CLASSES), batches, progress=lambda done, of: seen.append((done, of)))
    assert seen == [(3, total), (6, total), (7, total)]


def test_frozen_parameters_are_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 6), nn.LayerNorm(6), nn.Linear(6, CLASSES)
    )
    batch = torch.randn(5, 2, 5), torch.randint(CLASSES, (5,))
    for name in ("0.weight", "3.bias", "4.weight", "5.weight"):
        model.get_parameter(name).requires_grad_(False)
    fisher = limpet.diagonal_fisher(model, [batch])
    assert set(fisher) == {"0.bias", "3.weight", "4.bias", "5.bias"}
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, one_by_one(model, [batch]), BOUND[torch.float32])


def test_unused_parameters_are_zero() -> None:
    model = mlp(4, CLASSES)
    model.register_parameter("spare", nn.Parameter(torch.randn(3)))
    fisher = limpet.diagonal_fisher(model, [(torch.randn(2, 4), torch.tensor([0, 1]))])
    assert torch.equal(fisher["spare"], torch.zeros(3))
    assert fisher.routes["spare"] == "fused"


def test_bfloat16_sums_in_float32() -> None:
    torch.manual_seed(0)
    model = with_statistics(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES))
    ).bfloat16()
    batch = torch.randn(6, 3, 6, 6).bfloat16(), torch.randint(CLASSES, (6,))
    fisher = limpet.diagonal_fisher(model, [batch])
    assert all(value.dtype == torch.float32 for value in fisher.values())
    assert_fisher(fisher, one_by_one(model, [batch]), 3e-2)


def test_own_loss() -> None:
    def squared_error(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().sum(dim=1)

    torch.manual_seed(0)
    model = mlp(4, 6, 3)
    batch = torch.randn(5, 4), torch.randn(5, 3)
    fisher = limpet.diagonal_fisher(model, [batch], loss=squared_error)
    assert_fisher(fisher, one_by_one(model, [batch], squared_error), BOUND[torch.float32])


def test_many_batches_are_summed_in_two_levels() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, CLASSES)
    batches = [(torch.randn(1, 3), torch.randint(CLASSES, (1,))) for _ in range(600)]
    fisher = limpet.diagonal_fisher(model, batches)
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


def test_grad_mode_outside_does_not_matter() -> None:
    model, batch = mlp(4, CLASSES), (torch.randn(3, 4), torch.tensor([0, 1, 2]))
    want = limpet.diagonal_fisher(model, [batch])
    with torch.no_grad():
        assert_fisher(limpet.diagonal_fisher(model, [batch]), {k: v.double() for k, v in want.items()}, 0.0)


def test_identical_samples() -> None:
    torch.manual_seed(0)
    model = TimeMajor()
    batch = torch.randn(1, 7, 4).expand(4, -1, -1), torch.tensor([0, 0, 0, 0])
    fisher = limpet.diagonal_fisher(model, [batch])
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, one_by_one(model, [batch]), BOUND[torch.float32])


def test_lengths_that_change_from_batch_to_batch() -> None:
    torch.manual_seed(0)
    model = TimeMajor()
    batches = [(torch.randn(n, t, 4), torch.randint(CLASSES, (n,))) for n, t in ((4, 7), (3, 5), (1, 2), (4, 1))]
    fisher = limpet.diagonal_fisher(model, batches)
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


class Routed(nn.Module):
    """Each sample goes through the expert that its first feature chooses: its rows are picked out of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList(nn.Linear(4, 6) for _ in range(2)), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 6)
        for expert, chosen in zip(self.experts, (x[:, 0] > 0, x[:, 0] <= 0), strict=True):
            h = h.index_put((chosen,), expert(x[chosen]))
        return self.head(torch.tanh(h))


def test_routed_samples() -> None:
    torch.manual_seed(1)
    model = Routed()
    batches = [(torch.randn(8, 4), torch.randint(CLASSES, (8,))) for _ in range(3)]
    fisher = limpet.diagonal_fisher(model, batches)
    assert fisher.routes["head.weight"] == "fused"
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


def test_routed_samples_that_the_probe_sees_go_one_way() -> None:
    torch.manual_seed(0)
    model, (x, y) = Routed(), (torch.randn(8, 4), torch.randint(CLASSES, (8,)))
    x[:3, 0] = 1.0  # the probe's samples; the others are split among the experts
    fisher = limpet.diagonal_fisher(model, [(x, y)] * 2)
    assert fisher.routes["experts.0.weight"] == "per_sample"
    assert_fisher(fisher, one_by_one(model, [(x, y)] * 2), BOUND[torch.float32])


class Picked(nn.Module):
    """Rows picked out of the batch by their values, one linear layer applied to them all, and put back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear, self.head = how, nn.Linear(4, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # [N, T, 4], [N]
        n, t, _ = x.shape
        if self.how == "mask":
            mask = torch.arange(t) < lengths[:, None]
            h = x.new_zeros(n, t, 6).masked_scatter(mask[..., None].expand(n, t, 6), torch.tanh(self.linear(x[mask])))
            return self.head(h.sum(dim=1))
        if self.how == "lengths":
            ends = lengths.tolist()
            rows = torch.cat([sample[:end] for sample, end in zip(x, ends, strict=True)])
            return self.head(torch.stack([p.sum(dim=0) for p in torch.tanh(self.linear(rows)).split(ends)]))
        order = lengths.argsort()
        return self.head(torch.tanh(self.linear(x[order]))[order.argsort()].sum(dim=1))


@pytest.mark.parametrize("how", ["mask", "lengths", "sort"])
@pytest.mark.parametrize(
    "lengths", [[[2, 2, 2, 2], [1, 3, 2, 2]], [[2, 2, 2, 1, 3]], [[1, 2, 3, 2, 1, 3]]], ids=["later", "within", "order"]
)
def test_rows_picked_by_value(how: str, lengths: list[list[int]]) -> None:
    """The probe's samples have rows that a layout explains, and as many of them; the others have not."""
    torch.manual_seed(0)
    model = Picked(how)
    batches = [((torch.randn(len(n), 3, 4), torch.tensor(n)), torch.randint(CLASSES, (len(n),))) for n in lengths]
    fisher = limpet.diagonal_fisher(model, batches)
    assert fisher.routes["head.weight"] == "fused"
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


def test_rows_that_are_where_the_layout_says_stay_fused() -> None:
    class LastToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.head = nn.Linear(4, 6), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor, last: Tensor) -> Tensor:  # [N, T, 4], [N]
            return self.head(torch.tanh(self.linear(x))[torch.arange(len(x)), last])

    torch.manual_seed(0)
    model = LastToken()
    batches = [((torch.randn(n, 3, 4), torch.randint(3, (n,))), torch.randint(CLASSES, (n,))) for n in (40, 2, 1)]
    fisher = limpet.diagonal_fisher(model, batches)
    assert set(fisher.routes.values()) == {"fused"}
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


class TokenExperts(nn.Module):
    """Each token goes through its best expert, weighted by the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(4, 3), nn.Linear(4, CLASSES)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:  # [N, T, 4]
        tokens = x.reshape(-1, 4)
        weights, best = self.gate(tokens).softmax(dim=-1).topk(1)
        y = torch.zeros_like(tokens)
        for k, expert in enumerate(self.experts):
            (rows,) = torch.where(best[:, 0] == k)
            if len(rows):
                y = y.index_add(0, rows, expert(tokens[rows]) * weights[rows])
        return self.head(torch.tanh(y.view(x.shape)).mean(dim=1))


@pytest.mark.parametrize("seed", range(6))
def test_experts_of_tokens(seed: int) -> None:
    torch.manual_seed(seed)
    model = TokenExperts()
    batches = [(torch.randn(n, 3, 4), torch.randint(CLASSES, (n,))) for n in (6, 3, 3)]
    fisher = limpet.diagonal_fisher(model, batches)
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


@pytest.mark.parametrize("samples", [4, 2])
def test_a_shared_tensor_with_as_many_rows_as_the_probe_has_samples(samples: int) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # [N, 3, 4], [3, 3]
            return self.head((torch.softmax(self.query(x) @ x.transpose(1, 2) + mask, dim=-1) @ x).mean(dim=1))

    torch.manual_seed(0)
    model, mask = Masked(), torch.randn(3, 3)
    x, y = torch.randn(samples, 3, 4), torch.randint(CLASSES, (samples,))
    fisher = limpet.diagonal_fisher(model, [((x, mask), y)])
    assert set(fisher.routes.values()) == {"fused"}
    single = [((x[n : n + 1], mask[None]), y[n : n + 1]) for n in range(samples)]
    assert_fisher(fisher, one_by_one(model, single), BOUND[torch.float32])


def test_a_weight_that_is_computed_from_parameters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, CLASSES))
    batch = torch.randn(4, 4), torch.randint(CLASSES, (4,))
    fisher = limpet.diagonal_fisher(model, [batch])
    assert {name for name, route in fisher.routes.items() if route == "fused"} == {"0.bias", "2.weight", "2.bias"}
    assert_fisher(fisher, one_by_one(model, [batch]), BOUND[torch.float32])


class Sometimes(nn.Module):
    """Uses a parameter by a rule, and in some batches once for each sample as well."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return torch.stack([row * self.linear.bias for row in y]) if bool((x > 0).all()) else y


def test_a_use_that_appears_later() -> None:
    torch.manual_seed(0)
    model = Sometimes()
    batches = [(sign * torch.rand(3, 4), torch.randint(CLASSES, (3,))) for sign in (-1.0, 1.0)]
    fisher = limpet.diagonal_fisher(model, batches)
    assert fisher.routes == {"linear.weight": "fused", "linear.bias": "per_sample"}
    assert_fisher(fisher, one_by_one(model, batches), BOUND[torch.float32])


class Hidden(torch.autograd.Function):
    """Runs a module out of autograd's sight, as reentrant checkpointing does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x


class UsesHidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return Hidden.apply(torch.tanh(self.first(x)), self.second.weight)


def test_a_function_inside_a_custom_function() -> None:
    torch.manual_seed(0)
    model, batch = UsesHidden(), (torch.randn(4, 4), torch.randint(CLASSES, (4,)))
    fisher = limpet.diagonal_fisher(model, [batch])
    assert fisher.routes["second.weight"] == "per_sample"
    assert_fisher(fisher, one_by_one(model, [batch]), BOUND[torch.float32])


def test_attention() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, CLASSES)
    ).eval()
    batch = torch.randn(4, 3, 8), torch.randint(CLASSES, (4,))
    assert_fisher(limpet.diagonal_fisher(model, [batch]), one_by_one(model, [batch]), BOUND[torch.float32])


def test_mapping() -> None:
    fisher = limpet.diagonal_fisher(mlp(4, CLASSES), [(torch.randn(2, 4), torch.tensor([0, 1]))])
    assert isinstance(fisher, Mapping)
    assert list(fisher) == ["1.weight", "1.bias"]
    assert len(fisher) == 2
    assert "2 parameters, 0 of them per sample; 2 samples" in repr(fisher)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A random convolution, transposed or not, and an input that is large enough for it."""
    torch.manual_seed(draw(st.integers(0, 99)))
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, padding, dilation = sizes(1, 3), sizes(1, 3), sizes(0, 2), sizes(1, 2)
    spatial = tuple((k - 1) * d + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True))
    channels = 2 * groups, groups * draw(st.integers(1, 2))
    if draw(st.booleans()):
        kind: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
        padding = tuple(min(p, ((s - 1) * t + (k - 1) * d) // 2)
                        for p, s, t, k, d in zip(padding, spatial, stride, kernel, dilation, strict=True))  # fmt: skip
        extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
        layer = kind(*channels, kernel, stride, padding, extra, groups, dilation=dilation)
    else:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        layer = kind(*channels, kernel, stride, padding, dilation, groups)
    return layer, torch.randn(3, channels[0], *spatial, dtype=torch.float64)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions())
def test_any_convolution(case: tuple[nn.Module, Tensor]) -> None:
    layer, x = case
    layer.double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return (output.flatten(1).sin() + target[:, None]).square().sum(dim=1)

    batch = x, torch.rand(3, dtype=torch.float64)
    assert_fisher(
        limpet.diagonal_fisher(layer, [batch], loss=loss), one_by_one(layer, [batch], loss), BOUND[torch.float64]
    )


def test_rows_are_checked_once_for_each_set_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check costs a pass or two: nothing of ours may set it off in every batch."""
    checked = []
    monkeypatch.setattr(
        "limpet.fisher.computation.RowCheck",
        lambda losses, *rest, **options: checked.append(len(losses)) or RowCheck(losses, *rest, **options),
    )
    for model in (mlp(4, 5, 3), with_statistics(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))):
        limpet.diagonal_fisher(model, [(torch.randn(n, 4), torch.randint(3, (n,))) for n in (6, 6, 4, 6, 4, 1)])
    assert checked == [6, 4, 6, 4]
