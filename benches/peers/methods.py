"""Ways to the diagonal of the empirical Fisher: limpet's, the plain ones, and other packages'.

Each takes a problem and makes itself ready, outside the clock: ``run()`` then gives a tensor per parameter name, and
``scale`` times that is the mean over samples of the squared per-sample gradient. So a package that gives a sum is
divided by N after the clock has stopped, and none pays for a unit it does not use. What a package leaves on the model
(per-sample gradients, hooks' results) is taken away inside ``run``, as anyone would who calls it batch after batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import limpet
from peers.operators import declare_torchvision_operators
from peers.problems import Problem

Values = Mapping[str, Tensor]


@dataclass
class Ready:
    """A method made ready for one problem."""

    run: Callable[[], Values]
    scale: float | None = 1.0  # times the values: the mean of squares; None: the factor that fits best
    batches: int = 1  # how often run() goes over the problem's batch


@dataclass(frozen=True)
class Method:
    """How a method is called in tables, and the distribution that has its version."""

    name: str
    prepare: Callable[[Problem], Ready]
    package: str = "torch"
    note: str = ""


def _collect(model: nn.Module, values: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Values by ``id`` of a parameter, by its name; a parameter without one is left out."""
    return {name: values[id(p)] for name, p in model.named_parameters() if id(p) in values}


# --- plain torch -----------------------------------------------------------------------------------------------------


def ordinary(problem: Problem) -> Ready:
    """The baseline: one forward and backward of the batch."""
    model = problem.model()

    def run() -> Values:
        model.zero_grad(set_to_none=True)
        problem.loss(model(problem.inputs), problem.targets).sum().backward()
        model.zero_grad(set_to_none=True)
        return {}

    return Ready(run)


def sample_loop(problem: Problem) -> Ready:
    """One backward per sample. In float64 it is the specification that errors are measured against."""
    model = problem.model()
    params = dict(model.named_parameters())

    def run() -> Values:
        totals = {name: torch.zeros_like(p) for name, p in params.items()}
        for x, y in zip(problem.inputs.split(1), problem.targets.split(1), strict=True):
            grads = torch.autograd.grad(problem.loss(model(x), y).sum(), list(params.values()))
            torch._foreach_addcmul_(list(totals.values()), grads, grads)
        return totals

    return Ready(run, 1 / problem.size)


def vmapped(chunk: int | None) -> Callable[[Problem], Ready]:
    """``torch.func.vmap(grad)``, whole or in chunks of samples."""

    def prepare(problem: Problem) -> Ready:
        model = problem.model()
        params = {name: p.detach() for name, p in model.named_parameters()}
        buffers = dict(model.named_buffers())

        def loss(params: Values, x: Tensor, y: Tensor) -> Tensor:
            return problem.loss(functional_call(model, (params, buffers), (x[None],)), y[None])[0]

        per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
        size = chunk or problem.size

        def run() -> Values:
            totals = {name: torch.zeros_like(p) for name, p in params.items()}
            for x, y in zip(problem.inputs.split(size), problem.targets.split(size), strict=True):
                for name, g in per_sample(params, x, y).items():
                    totals[name] += g.square_().sum(0)
            return totals

        return Ready(run, 1 / problem.size)

    return prepare


# --- limpet ----------------------------------------------------------------------------------------------------------


def limpet_call(batches: int) -> Callable[[Problem], Ready]:
    """``limpet.diagonal_fisher`` over the same batch several times, as in use: the layout is probed once a call."""

    def prepare(problem: Problem) -> Ready:
        model = problem.model()
        pairs = [(problem.inputs, problem.targets)] * batches
        return Ready(lambda: limpet.diagonal_fisher(model, pairs, loss=problem.loss), 1.0, batches)

    return prepare


# --- other packages --------------------------------------------------------------------------------------------------


def backpack(problem: Problem) -> Ready:
    """BackPACK's ``SumGradSquared``: sums of squares, for a loss that is summed over samples."""
    import backpack
    from backpack.extensions import SumGradSquared

    model = backpack.extend(problem.model())

    def run() -> Values:
        with backpack.backpack(SumGradSquared()):
            problem.loss(model(problem.inputs), problem.targets).sum().backward()
        found = {id(p): p.sum_grad_squared for p in model.parameters() if hasattr(p, "sum_grad_squared")}
        for p in model.parameters():
            p.grad = None
            if hasattr(p, "sum_grad_squared"):
                del p.sum_grad_squared
        return _collect(model, found)

    return Ready(run, 1 / problem.size)


def _opacus(problem: Problem, wrap: Callable[[nn.Module], Any], model: nn.Module) -> Ready:
    wrapped = wrap(model)

    def run() -> Values:
        problem.loss(wrapped(problem.inputs), problem.targets).sum().backward()
        samples = {id(p): p.grad_sample for p in model.parameters() if getattr(p, "grad_sample", None) is not None}
        found = {key: g.square_().sum(0) for key, g in samples.items()}
        for p in model.parameters():
            p.grad = p.grad_sample = None
        return _collect(model, found)

    return Ready(run, 1 / problem.size)


def opacus_hooks(problem: Problem) -> Ready:
    """Opacus' hooks, which work in training mode only: the same here, as it refuses BatchNorm and dropout is 0."""
    from opacus.grad_sample import GradSampleModule

    return _opacus(problem, lambda model: GradSampleModule(model, loss_reduction="sum"), problem.model().train())


def opacus_expanded_weights(problem: Problem) -> Ready:
    """Opacus over torch's ExpandedWeights."""
    from opacus.grad_sample import GradSampleModuleExpandedWeights

    return _opacus(problem, lambda m: GradSampleModuleExpandedWeights(m, loss_reduction="sum"), problem.model())


def asdl(problem: Problem) -> Ready:
    """ASDL's empirical Fisher, diagonal; ``data_size=1`` gives the sum over the batch."""
    from asdl.fisher import FISHER_EMP, SHAPE_DIAG, FisherConfig, get_fisher_maker

    model = problem.model()
    maker = get_fisher_maker(model, FisherConfig(FISHER_EMP, [SHAPE_DIAG], data_size=1))

    def loss(outputs: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        return problem.loss(outputs, targets).sum()  # ASDL asks for a function with a reduction, and for "sum"

    def run() -> Values:
        maker.setup_loss_call(loss, maker.setup_model_call(model, problem.inputs), problem.targets)
        maker.forward_and_backward()
        found: dict[int, Tensor] = {}
        for module in model.modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for kind in ("weight", "bias"):
                value = getattr(diagonal, kind, None)
                if value is not None:  # a tied parameter has one value per module, which it would have us add
                    key = id(getattr(module, kind))
                    found[key] = found[key] + value if key in found else value
        maker.zero_fisher()
        model.zero_grad(set_to_none=True)
        return _collect(model, found)

    return Ready(run, 1 / problem.size)


def nngeometry(problem: Problem) -> Ready:
    """nngeometry's ``PMatDiag`` of the log-likelihood.

    It divides by the loader's number of indices: one, because the loader reads the batch as a whole. Its own way with a
    pair of tensors reads sample by sample, which would cost it a tenth of the MLP's time.
    """
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag, PVector

    model = problem.model()
    layers = LayerCollection.from_model(model)
    generator = TorchHooksJacobianBackend(
        layer_collection=layers, model=model, function=lambda x, y: problem.loss(model(x), y)
    )
    data = TensorDataset(problem.inputs, problem.targets)
    whole = BatchSampler(SequentialSampler(data), problem.size, drop_last=False)
    loader = DataLoader(data, sampler=whole, batch_size=None)
    modules = dict(model.named_modules())

    def run() -> Values:
        vector = PVector(layers, vector_repr=PMatDiag(generator=generator, examples=loader).get_diag())
        found: dict[int, Tensor] = {}
        for name, values in vector.to_dict().items():
            for kind, value in zip(("weight", "bias"), values, strict=False):
                key = id(getattr(modules[name], kind))
                found[key] = found[key] + value if key in found else value
        return _collect(model, found)

    return Ready(run, 1 / problem.size)


class _WholeBatches(TensorDataset):
    """Hands the loader a batch as it lies, with the task labels that Avalanche wants."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        return (*(t[indices[0] : indices[-1] + 1] for t in self.tensors), torch.zeros(len(indices)))

    @staticmethod
    def collate_fn(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return batch


def avalanche(problem: Problem) -> Ready:
    """Avalanche's ``EWCPlugin.compute_importances``: the square of the batch's mean gradient.

    Times N it is ``(sum_n g_n)^2 / N``, in the unit of ``sum_n g_n^2 / N``, and right in expectation where the
    gradients are independent with mean zero, as they are for labels drawn from the model. For the data's labels they
    are not, and users tune a strength to what they get. So it is given the best single factor (least squares over all
    parameters): the error that is left is what no strength can make up for.
    """
    declare_torchvision_operators()
    from avalanche.training.plugins.ewc import EWCPlugin

    model = problem.model()
    plugin = EWCPlugin(ewc_lambda=1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = _WholeBatches(problem.inputs, problem.targets)

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return problem.loss(outputs, targets).mean()

    def run() -> Values:
        found = plugin.compute_importances(model, criterion, optimizer, data, "cpu", problem.size)
        optimizer.zero_grad()
        return {name: value.data for name, value in found.items()}

    return Ready(run, None)


def methods(batches: int, chunk: int) -> list[Method]:
    """Every method, limpet's call over ``batches`` batches, and vmap in chunks of ``chunk`` samples."""
    whole = "one batch" if batches == 1 else f"{batches} batches"
    ours = [Method(f"limpet, {whole} a call", limpet_call(batches), "limpet")]
    if batches > 1:
        ours.append(Method("limpet, one batch a call", limpet_call(1), "limpet", "pays for the probe every time"))
    return [
        *ours,
        Method("loop of batch size 1", sample_loop),
        Method("vmap(grad)", vmapped(None)),
        Method(f"vmap(grad), chunks of {chunk}", vmapped(chunk)),
        Method("BackPACK SumGradSquared", backpack, "backpack-for-pytorch"),
        Method("Opacus, hooks", opacus_hooks, "opacus"),
        Method("Opacus, ExpandedWeights", opacus_expanded_weights, "opacus"),
        Method("ASDL", asdl, "asdfghjkl"),
        Method("nngeometry", nngeometry, "nngeometry"),
        Method(
            "Avalanche EWC", avalanche, "avalanche-lib", "square of the batch's mean gradient, times the best factor"
        ),
    ]
