"""The Fisher family on a GPU: contractions beside plain products, whole models beside one ordinary pass."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import limpet
from gpu_report import Cell, Table
from gpu_timing import Run, compiled_milliseconds, milliseconds
from limpet import ops, reference
from peers.methods import Ready, sample_loop, vmapped
from peers.problems import GPT2, MEASURED, Loss, Problem, smooth_samples, token_cross_entropy
from tolerances import relative_error

# (N, T, O, I): convolutions of a ResNet-18 as patches at batch 256, layers of GPT-2 at batch 8, an encoder's, an MLP's.
SIZES = [
    (256, 16, 512, 4608),
    (256, 64, 256, 2304),
    (256, 256, 128, 1152),
    (256, 1024, 64, 576),
    (8, 1024, 2304, 768),
    (8, 1024, 3072, 768),
    (8, 1024, 768, 768),
    (8, 128, 3072, 768),
    (64, 64, 1024, 256),
    (4096, 1, 1024, 1024),
    (128, 1, 1024, 1024),
]


# --- contraction -----------------------------------------------------------------------------------------------------


def contraction_row(sizes: tuple[int, int, int, int], dtype: torch.dtype, rate: float, deadline: float) -> list[Cell]:
    """One shape: ours, the plain product, the reference, and the reference compiled."""
    n, t, o, i = sizes
    d, a = torch.randn(n, t, o, device="cuda").to(dtype), torch.randn(n, t, i, device="cuda").to(dtype)
    flat_d, flat_a, total = d.flatten(0, 1), a.flatten(0, 1), torch.zeros(o, i, device="cuda")
    few = slice(0, 2 if t > 1 else 64)
    want = reference.sum_grad_squared_linear(d[few].double(), a[few].double())
    error = relative_error(ops.sum_grad_squared_linear(d[few], a[few]), want)
    runs: dict[str, Run] = {
        "ours": lambda: ops.sum_grad_squared_linear(d, a, into=total),
        "plain": lambda: flat_d.T @ flat_a,
    }
    if n * o * i < 2**31:  # it materialises one gradient a sample
        runs["reference"] = lambda: reference.sum_grad_squared_linear(d, a)
    times = milliseconds(runs, graph_calls=4)
    compiled_ms = None
    if time.monotonic() < deadline and n <= 8:  # the compiled graph has a node for each sample
        compiled_ms = compiled_milliseconds(reference.sum_grad_squared_linear, d, a)
    share = 2 * n * t * o * i / (times["ours"] * 1e-3) / rate
    ratio = times["ours"] / times["plain"]
    row = [", ".join(map(str, sizes)), times["ours"], times["plain"], ratio, share, error]
    return [*row, times.get("reference"), compiled_ms]


def contraction(dtype: torch.dtype, rate: float, deadline: float) -> tuple[Table, list[Callable[[], list[Cell]]]]:
    """``sum_n (sum_t d a^T)^2`` beside the plain product ``d^T a`` of the same shape and precision."""
    columns = ["N, T, O, I", "ms", "plain product ms", "ratio", "share of matrix rate", "error against float64"]
    columns += ["reference ms", "torch.compile(reference) ms"]
    table = Table(f"Fisher contraction, {dtype}, at most 1.2", columns)
    return table, [partial(contraction_row, sizes, dtype, rate, deadline) for sizes in SIZES]


# --- whole models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    """A model with its batch; ``autocast`` is the dtype of mixed precision, ``few`` the samples of error's check."""

    name: str
    make: Callable[[], tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Loss]]
    batch: int
    target: float | None
    few: int
    autocast: torch.dtype | None = None
    chunk: int | None = None  # samples of vmap at a time

    def precision(self) -> torch.autocast:
        """The context of every pass."""
        return torch.autocast("cuda", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None)


def _gpt2() -> tuple[nn.Module, Callable[[int], tuple[Tensor, Tensor]], Loss]:
    def tokens(n: int) -> tuple[Tensor, Tensor]:
        return torch.randint(50257, (n, 1024)), torch.randint(50257, (n, 1024))

    return GPT2(), tokens, token_cross_entropy


TIMED = [
    Timed("MLP 784-1024-1024-10", MEASURED["mlp"].make, 128, None, 128),
    Timed("CIFAR ResNet-18", MEASURED["resnet18"].make, 256, 1.15, 8, chunk=64),
    Timed("CIFAR ResNet-18", MEASURED["resnet18"].make, 256, None, 8, autocast=torch.bfloat16, chunk=64),
    Timed("encoder d=256, 4 layers, 64 places", MEASURED["encoder"].make, 64, None, 8),
    Timed("GPT-2 small shape, 1024 tokens, tied", _gpt2, 8, 1.15, 1, autocast=torch.bfloat16, chunk=4),
]


def peak_bytes(run: Run) -> int:
    """The most memory held on the device during a call, beyond what was held before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def worst_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest relative error of a parameter."""
    return max(relative_error(got[name], value) for name, value in want.items())


def scaled(ready: Ready) -> dict[str, Tensor]:
    """A method's values as means over samples."""
    return {name: value * (ready.scale or 1.0) for name, value in ready.run().items()}


def whole_model_row(case: Timed) -> list[Cell]:
    """One model: a later batch of an accumulator, a call of four batches, vmap, memory and errors."""
    torch.manual_seed(0)
    model, make_batch, loss = case.make()
    model = model.eval()
    few = tuple(t.cuda() for t in smooth_samples(model, make_batch, case.few))
    model = model.cuda()
    batch = tuple(t.cuda() for t in make_batch(case.batch))
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    accumulator = limpet.FisherAccumulator(model, loss=loss)

    def ordinary() -> None:
        model.zero_grad()
        with case.precision():
            loss(model(batch[0]), batch[1]).sum().backward()

    def later() -> None:
        with case.precision():
            accumulator.add(batch)

    def call() -> None:
        with case.precision():
            limpet.diagonal_fisher(model, [batch] * 4, loss=loss)

    later()
    times = milliseconds({"later": later, "ordinary": ordinary, "call": call}, rounds=12, graph_calls=0)
    ordinary_peak, later_peak = peak_bytes(ordinary), peak_bytes(later)
    model.zero_grad(set_to_none=True)
    vmap_ms: float | None
    try:
        with case.precision():
            mapped = vmapped(case.chunk)(Problem(model, *batch, loss))
            vmap_ms = milliseconds({"vmap": mapped.run}, rounds=2, graph_calls=0)["vmap"]
    except Exception as error:  # not every model lets itself be mapped
        print(f"vmap of {case.name}: {type(error).__name__}: {error}")
        vmap_ms = None

    with case.precision():
        got = limpet.diagonal_fisher(model, [few], loss=loss)
        independent = scaled(sample_loop(Problem(model, *few, loss)))
    wide = (t.double() if t.is_floating_point() else t for t in few)
    want = scaled(sample_loop(Problem(model.double(), *wide, loss)))
    precision = "float32" if case.autocast is None else f"autocast {str(case.autocast)[6:]}"
    return [
        case.name, precision, case.batch, times["ordinary"], times["later"], times["later"] / times["ordinary"],
        case.target, times["call"] / (4 * times["ordinary"]), vmap_ms and vmap_ms / times["later"],
        (later_peak - ordinary_peak) / size, worst_error(got, want), worst_error(independent, want),
    ]  # fmt: skip


def whole_models() -> tuple[Table, list[Callable[[], list[Cell]]]]:
    """``diagonal_fisher`` beside one ordinary pass, Python's time included."""
    columns = ["model", "precision", "batch", "ordinary pass ms", "later batch ms", "ratio", "at most"]
    columns += ["a call of 4 batches / 4 passes", "vmap / later batch", "extra memory / parameters"]
    columns += ["error against float64", "single samples' error"]
    installed = [case for case in TIMED if find_spec("transformers") or "GPT-2" not in case.name]
    return Table("Diagonal Fisher beside one ordinary pass", columns), [partial(whole_model_row, c) for c in installed]
