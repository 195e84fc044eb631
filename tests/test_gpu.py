"""What only a GPU can show: kernels against the float64 reference, the same bits twice, no waiting for the device.

Run by `make gpu-check`; skipped where there is no CUDA device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import limpet
from limpet import ops, reference
from op_cases import CHANNELS, CONV, LINEAR, Conv
from test_path_integral import STORED as STORED_STEPS
from test_path_integral import check, expected, public, step_inputs, without_penalty
from tolerances import RELATIVE_ERROR, assert_close, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _float32_is_float32() -> Iterator[None]:
    """No tf32 in the model's own products; the kernels use it in three parts, with float32's accuracy."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """From the call on, a call that waits for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def assert_sum_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """float32 within float32's bound; matrix units add 16-bit products with fewer guard bits, so within float16's."""
    bound = RELATIVE_ERROR[torch.float32 if dtype == torch.float32 else torch.float16]
    assert got.dtype == torch.float32
    assert relative_error(got, want) <= bound


def agrees_with_float64(op: Callable[..., Tensor], expected: Callable[..., Tensor], *tensors: Tensor) -> None:
    """``op`` on the device, twice, against ``expected`` in float64 on the CPU: close, and the same bits both times."""
    on_device = [t.cuda() for t in tensors]
    got, again = op(*on_device), op(*on_device)
    assert torch.equal(got, again)
    want = expected(*(t.double() if t.is_floating_point() else t for t in tensors))
    assert_sum_close(got, want, tensors[0].dtype)


# --- fisher ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", LINEAR, ids=str)
def test_linear(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    n, t, o, i = sizes
    d, a = torch.randn(n, t, o).to(dtype), torch.randn(n, t, i).to(dtype)
    agrees_with_float64(ops.sum_grad_squared_linear, ops.sum_grad_squared_linear, d, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_with_strides(dtype: torch.dtype) -> None:
    d = torch.randn(30, 5, 140).to(dtype).transpose(0, 1)[..., ::2]
    a = torch.randn(90, 30, 5).to(dtype).permute(2, 1, 0)
    agrees_with_float64(ops.sum_grad_squared_linear, ops.sum_grad_squared_linear, d, a)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_and_norm_with_their_bias(dtype: torch.dtype) -> None:
    d, a, x = (torch.randn(7, 30, channels).to(dtype) for channels in (40, 50, 40))
    mean, rstd = torch.randn(7, 30, 1), torch.rand(7, 30, 1)

    def linear_bias(d: Tensor, a: Tensor) -> Tensor:
        bias = ops.sum_grad_squared_bias(torch.zeros_like(d))
        ops.sum_grad_squared_linear(d, a, bias_into=bias)
        return bias

    def norm_bias(d: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        bias = ops.sum_grad_squared_bias(torch.zeros_like(d))
        ops.sum_grad_squared_norm(d, x, mean, rstd, bias_into=bias)
        return bias

    agrees_with_float64(linear_bias, linear_bias, d, a)
    agrees_with_float64(norm_bias, norm_bias, d, x, mean, rstd)
    agrees_with_float64(ops.sum_grad_squared_norm, ops.sum_grad_squared_norm, d, x, mean, rstd)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(4, 100, 300, 200), (200, 1, 300, 200), (300, 40, 128, 64)], ids=str)
def test_a_measured_tile_gives_the_same_bits(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = pytest.importorskip("limpet.triton_kernels._tuning")
    n, t, o, i = sizes
    d, a = torch.randn(n, t, o).to(dtype).cuda(), torch.randn(n, t, i).to(dtype).cuda()
    monkeypatch.setattr(tuning, "_fastest", {})
    unmeasured = ops.sum_grad_squared_linear(d, a)
    monkeypatch.setattr(tuning, "WORTH_TUNING", 1)
    assert torch.equal(ops.sum_grad_squared_linear(d, a), unmeasured)  # measures
    assert tuning._fastest
    assert torch.equal(ops.sum_grad_squared_linear(d, a), unmeasured)


@pytest.mark.parametrize("places", [16, 64, 1000])
def test_float32_is_as_accurate_as_float32(places: int) -> None:
    d, a = torch.randn(4, places, 200), torch.randn(4, places, 300)
    want = ops.sum_grad_squared_linear(d.double(), a.double())
    assert relative_error(ops.sum_grad_squared_linear(d.cuda(), a.cuda()), want) <= 2e-6


def test_a_convolution_in_float32_is_as_accurate_as_float32() -> None:
    d, x = torch.randn(4, 96, 32, 32), torch.randn(4, 64, 32, 32)
    want = ops.sum_grad_squared_conv(d.double(), x.double(), 3, padding=1)
    assert relative_error(ops.sum_grad_squared_conv(d.cuda(), x.cuda(), 3, padding=1), want) <= 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv(case: Conv, channels_last: bool, dtype: torch.dtype) -> None:
    d, x = case.make(dtype)
    if channels_last:
        if d.dim() != 4:
            pytest.skip("channels-last is a layout of four dimensions")
        d, x = (t.to(memory_format=torch.channels_last) for t in (d, x))

    def op(d: Tensor, x: Tensor) -> Tensor:
        return ops.sum_grad_squared_conv(d, x, case.kernel, **case.geometry)  # type: ignore[arg-type]

    agrees_with_float64(op, op, d, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), CHANNELS, ids=str)
def test_bias_and_scale(shape: tuple[int, ...], channel_dim: int, dtype: torch.dtype) -> None:
    d, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    for op, tensors in ((ops.sum_grad_squared_bias, (d,)), (ops.sum_grad_squared_scale, (d, x))):

        def along(*tensors: Tensor, op: Callable[..., Tensor] = op) -> Tensor:
            return op(*tensors, channel_dim=channel_dim)

        agrees_with_float64(along, along, *tensors)

    def centred(d: Tensor, x: Tensor, shift: Tensor) -> Tensor:
        return ops.sum_grad_squared_scale(d, x, channel_dim=channel_dim, shift=shift)

    def beside(d: Tensor, x: Tensor, shift: Tensor) -> Tensor:
        bias = ops.sum_grad_squared_bias(torch.zeros_like(d), channel_dim=channel_dim)
        ops.sum_grad_squared_scale(d, x, channel_dim=channel_dim, shift=shift, bias_into=bias)
        return bias

    shift = torch.randn(shape[channel_dim])
    agrees_with_float64(centred, centred, d, x, shift)
    agrees_with_float64(beside, beside, d, x, shift)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding(dtype: torch.dtype) -> None:
    d, indices = torch.randn(9, 70, 130).to(dtype), torch.randint(0, 11, (9, 70))

    def op(d: Tensor, indices: Tensor) -> Tensor:
        return ops.sum_grad_squared_embedding(d, indices, 12, padding_idx=3)

    agrees_with_float64(op, op, d, indices)


def test_fisher_sums_do_not_wait_for_the_device(no_waiting: Callable[[], None]) -> None:
    d, a = torch.randn(4, 6, 20, device="cuda"), torch.randn(4, 6, 30, device="cuda")
    indices = torch.randint(0, 5, (4, 6), device="cuda")

    def every_op() -> None:
        ops.sum_grad_squared_linear(d, a)
        ops.sum_grad_squared_conv(d, a[:, :, :20].contiguous(), 1)
        ops.sum_grad_squared_bias(d)
        ops.sum_grad_squared_scale(d, d)
        ops.sum_grad_squared_embedding(d, indices, 5)

    every_op()  # compiles
    no_waiting()
    every_op()


# --- quadratic -------------------------------------------------------------------------------------------------------

# Empty, one element, odd, several chunks; more tensors than one launch takes are tested apart.
SHAPES = [(0,), (1,), (7, 3), (8192,), (8193,), (3, 5, 1001), (200_003,)]
STORED = [(theta, anchor, weight) for theta in DTYPES for anchor in DTYPES for weight in DTYPES]
STORED += [(torch.float64,) * 3]

Lists = tuple[list[Tensor], list[Tensor], list[Tensor]]


def on_device(shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> Lists:
    """Parameters that require grad, anchors near them, importances that are not negative."""
    params = [torch.randn(shape, device="cuda").to(dtypes[0]).requires_grad_() for shape in shapes]
    anchors = [(p.detach().double() + 0.1 * torch.randn(p.shape, device="cuda")).to(dtypes[1]) for p in params]
    weights = [torch.rand(p.shape, device="cuda").to(dtypes[2]) for p in params]
    return params, anchors, weights


def in_float64(lists: Lists) -> Lists:
    params, anchors, weights = ([t.detach().double().cpu() for t in tensors] for tensors in lists)
    return [p.requires_grad_() for p in params], anchors, weights


def check_quadratic(lists: Lists) -> None:
    """Value, backward and the in-place gradient against float64, each the same bits twice."""
    want_params, want_anchors, want_weights = in_float64(lists)
    want = reference.quadratic_penalty(want_params, want_anchors, want_weights, 3.0)
    want_grads = torch.autograd.grad(want, want_params)

    params = lists[0]
    value = ops.quadratic_penalty(*lists, 3.0)
    grads = torch.autograd.grad(2.0 * value, params)
    assert_close(value, want)
    for p, grad, want_grad in zip(params, grads, want_grads, strict=True):
        assert_close(grad, 2.0 * want_grad, p.dtype)
    assert torch.equal(value, ops.quadratic_penalty(*lists, 3.0))

    for p in params:
        p.grad = torch.ones_like(p)
    added = ops.add_quadratic_penalty_grad_(*lists, 3.0)
    assert torch.equal(added, value)
    for p, want_grad in zip(params, want_grads, strict=True):
        assert_close(p.grad, 1.0 + want_grad, p.dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtypes", STORED, ids=str)
def test_quadratic(dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]) -> None:
    check_quadratic(on_device(SHAPES, dtypes))


def test_quadratic_of_misaligned_strided_and_mixed_tensors() -> None:
    params, anchors, weights = on_device([(1001,), (40, 50), (999,), (2, 3, 8, 8)], (torch.float32,) * 3)
    params += [p.detach().bfloat16().requires_grad_() for p in params]
    anchors, weights = anchors * 2, weights * 2
    params[0] = params[0].detach()[1:].requires_grad_()  # 4 bytes off a 16-byte boundary
    anchors[0], weights[0] = anchors[0][1:], weights[0][:-1]
    params[1] = params[1].detach().t().contiguous().t().requires_grad_()
    params[3] = params[3].detach().to(memory_format=torch.channels_last).requires_grad_()
    check_quadratic((params, anchors, weights))


def test_quadratic_of_more_tensors_than_one_launch_takes() -> None:
    check_quadratic(on_device([(k % 50 + 1,) for k in range(1500)], (torch.float32,) * 3))


def test_quadratic_of_no_elements() -> None:
    assert ops.quadratic_penalty(*on_device([(0,), (3, 0)], (torch.float32,) * 3), 1.0).item() == 0.0


def test_quadratic_does_not_wait_for_the_device(no_waiting: Callable[[], None]) -> None:
    params, anchors, weights = on_device(SHAPES, (torch.float32,) * 3)
    for p in params:
        p.grad = torch.zeros_like(p)
    no_waiting()
    ops.quadratic_penalty(params, anchors, weights, 2.0).backward()
    ops.add_quadratic_penalty_grad_(params, anchors, weights, 2.0)


def test_quadratic_in_a_cuda_graph() -> None:
    """A captured pass reads the parameters of the moment it is replayed."""
    params, anchors, weights = on_device(SHAPES, (torch.float32,) * 3)
    for p in params:
        p.grad = torch.zeros_like(p)
    ops.add_quadratic_penalty_grad_(params, anchors, weights, 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = ops.add_quadratic_penalty_grad_(params, anchors, weights, 2.0)
    with torch.no_grad():
        for p in params:
            p.add_(1.0)
            p.grad.zero_()  # type: ignore[union-attr]
    graph.replay()
    want_params, want_anchors, want_weights = in_float64((params, anchors, weights))
    want = reference.quadratic_penalty(want_params, want_anchors, want_weights, 2.0)
    assert_close(value, want)
    for p, want_grad in zip(params, torch.autograd.grad(want, want_params), strict=True):
        assert_close(p.grad, want_grad, torch.float32)  # type: ignore[arg-type]


# --- path integral ---------------------------------------------------------------------------------------------------

Step = dict[str, list[Tensor]]
PATH_INTEGRAL = [public]
if importlib.util.find_spec("triton") is not None:
    PATH_INTEGRAL.append(importlib.import_module("limpet.triton_kernels.path_integral").path_integral_update_)


def step_on_device(shapes: list[tuple[int, ...]], *dtypes: torch.dtype) -> Step:
    return {name: [t.cuda() for t in tensors] for name, tensors in step_inputs(shapes, *dtypes).items()}


@pytest.mark.parametrize("update", PATH_INTEGRAL, ids=["op", "triton"][: len(PATH_INTEGRAL)])
@pytest.mark.parametrize("dtypes", STORED_STEPS, ids=str)
def test_path_integral(dtypes: tuple[torch.dtype, ...], update: Callable[..., None]) -> None:
    if torch.float64 in dtypes and update is not public:
        pytest.skip("the Triton kernels are float32's")
    check(step_on_device(SHAPES, *dtypes), update=update)
    check(without_penalty(step_on_device(SHAPES, *dtypes)), update=update)


def test_path_integral_of_misaligned_strided_and_mixed_tensors() -> None:
    steps = [step_on_device([(1001,), (40, 50), (2, 3, 8, 8)], *dtypes) for dtypes in STORED_STEPS]
    step = {name: [t for each in steps for t in each[name]] for name in steps[0]}
    for name, tensors in step.items():
        first, second, third = tensors[:3]
        tensors[0] = first[1:].clone() if name == "grads" else first[1:]  # an element off a 16-byte boundary
        tensors[1] = second.t().contiguous().t() if name in ("params", "integrals") else second
        tensors[2] = third.to(memory_format=torch.channels_last)
    check(step)


def test_path_integral_of_more_tensors_than_one_launch_takes() -> None:
    check(step_on_device([(k % 50 + 1,) for k in range(1500)]))


def test_path_integral_gives_the_same_bits_without_waiting(no_waiting: Callable[[], None]) -> None:
    first = step_on_device(SHAPES)
    second = {name: [t.clone() for t in tensors] for name, tensors in first.items()}
    warm = {name: [t.clone() for t in tensors] for name, tensors in first.items()}
    public(*warm.values(), 2.0)  # loads the kernels
    no_waiting()
    public(*first.values(), 2.0)
    public(*second.values(), 2.0)
    torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first["integrals"], second["integrals"]))


def test_path_integral_in_a_cuda_graph() -> None:
    """A captured update follows the parameters as they move between replays."""
    step = step_on_device(SHAPES)
    step["grads"] = [g.nan_to_num() for g in step["grads"]]
    warm = {name: [t.clone() for t in tensors] for name, tensors in step.items()}
    public(*warm.values(), 2.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        public(*step.values(), 2.0)
    for _ in range(2):
        want = expected({name: [t.cpu() for t in tensors] for name, tensors in step.items()}, 2.0)
        graph.replay()
        for got, wanted in zip(step["integrals"], want, strict=True):
            assert_close(got, wanted)
        for param in step["params"]:
            param.add_(0.1)


# --- models ----------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """An embedding, a convolution, a normalisation and two linear layers on one input of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.norm = nn.LayerNorm(12)
        self.hidden = nn.Linear(12, 40)
        self.head = nn.Linear(40, 5)

    def forward(self, tokens: Tensor) -> Tensor:  # [N, T] -> [N, 5]
        x = self.conv(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return self.head(torch.tanh(self.hidden(self.norm(x))).mean(dim=1))


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module, Any, Any]:
    """The same model on the device in float32 and on the CPU in float64, and the same batches for each."""
    model = Small()
    batches = [(torch.randint(0, 20, (16, 9)), torch.randint(0, 5, (16,))) for _ in range(3)]
    wide = Small().double()
    wide.load_state_dict(model.state_dict())
    return model.cuda(), wide, [(x.cuda(), y.cuda()) for x, y in batches], batches


def test_diagonal_fisher(models: tuple[nn.Module, nn.Module, Any, Any]) -> None:
    model, wide, batches, wide_batches = models
    got, want = limpet.diagonal_fisher(model, batches), limpet.diagonal_fisher(wide, wide_batches)
    assert set(got) == set(want)
    assert set(got.routes.values()) == {"fused"}
    for name in want:
        assert relative_error(got[name], want[name]) <= 1e-5, name


def test_ewc(models: tuple[nn.Module, nn.Module, Any, Any]) -> None:
    model, wide, batches, wide_batches = models
    values = []
    for network, data in ((model, batches), (wide, wide_batches)):
        ewc = limpet.EWC(network, strength=1e3)
        ewc.consolidate(data)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.1)
        values.append(ewc.penalty())
        ewc.add_penalty_grad_()
    assert relative_error(*values) <= 1e-5
    for (name, got), want in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert relative_error(got.grad, want.grad) <= 1e-5, name  # type: ignore[arg-type]
