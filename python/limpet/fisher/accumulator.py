"""``FisherAccumulator``: the diagonal Fisher information of batches as they come, of several processes, and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointError

from limpet import _checks
from limpet.fisher import batches as batch_reading
from limpet.fisher import checks
from limpet.fisher.batched import Batched
from limpet.fisher.batches import Batch
from limpet.fisher.checks import Buffers, buffers_kept, tracked_parameters
from limpet.fisher.computation import Computation
from limpet.fisher.labels import LABELS, Loss, objective_of
from limpet.fisher.result import ROUTES, DiagonalFisher
from limpet.fisher.sums import Sums
from limpet.reference import wide

_BATCHED = (
    "labels='batched' squares the mean gradient of each batch. That is not the Fisher information: its size and its "
    "pattern depend on the batch size. It is here to reproduce old results; 'data', 'sampled' and 'expected' are exact"
)
_STATE = ("labels", "seed", "num_samples", "num_batches", "loss_scale", "routes", "running", "totals")


class FisherAccumulator:
    """The diagonal Fisher information of batches as they come: :func:`limpet.diagonal_fisher` in pieces.

    The sums of squared gradients and the number of samples are all that is kept, so accumulators add up: over time,
    over processes, over interruptions. The first :meth:`add` finds out which rows belong to which sample; later ones
    cost a forward and a backward pass.

    Args:
        model: as for :func:`limpet.diagonal_fisher`. Its parameters stay the same objects; their values may change
            between batches, and then each batch counts with the values it met.
        labels: as for :func:`limpet.diagonal_fisher`.
        loss: as for :func:`limpet.diagonal_fisher`.
        seed: as for :func:`limpet.diagonal_fisher`; where labels are sampled, give each process a seed of its own.

    Raises:
        TypeError: an argument is not what it must be.
        ValueError: an argument's value cannot be used.
        RuntimeError: as :func:`limpet.diagonal_fisher`.

    >>> model = nn.Linear(2, 2)
    >>> accumulator = FisherAccumulator(model)
    >>> for _ in range(3):
    ...     accumulator.add((torch.randn(4, 2), torch.randint(2, (4,))))
    >>> accumulator.num_samples
    12
    >>> accumulator.fisher()
    DiagonalFisher(2 parameters, 0 of them per sample; 12 samples)
    """

    def __init__(self, model: nn.Module, *, labels: str = "data", loss: Loss | None = None, seed: int = 0) -> None:
        self._labels = _checks.one_of("labels", labels, LABELS)
        if loss is not None and not callable(loss):
            raise TypeError(f"loss must be callable, got {_checks.describe(loss)}")
        self._model, self._loss, self._seed = model, loss, _seed("seed", seed)
        self._params = _parameters(model)
        if labels == "batched":
            warnings.warn(_BATCHED, UserWarning, stacklevel=2)
        self._num_samples = 0
        self._torn: int | None = None  # the batch of which sums may hold a part
        self._standing: list[Any] | None = None  # the model's when it was last looked at, and
        self._stood: Any = None  # what it names by ``id``
        self._computation = self._new_computation(self._seed)

    @property
    def num_samples(self) -> int:
        """The samples added so far, those of merged accumulators included."""
        return self._num_samples

    def add(self, batch: Any) -> None:
        """Add one batch.

        Args:
            batch: a pair ``(inputs, targets)``, as :func:`limpet.diagonal_fisher` takes them.

        Raises:
            TypeError: the batch is not what it must be. Nothing has changed then.
            ValueError: the batch holds no samples, or its sizes do not match. Nothing has changed then.
            RuntimeError: the model's parameters are not those it had, or as :func:`limpet.diagonal_fisher`.

        Whatever is raised before the first gradient was summed (a loss that is not finite, samples that interact, an
        error of the model's), nothing of the batch counts. Raised later (in float16, at any time in the batch), the
        sums may hold a part of it: the accumulator then refuses further use until :meth:`load_state_dict` gives it a
        state from before.

        A later batch waits for a GPU once, when its loss is read. A gradient there that is not finite is reported by
        the next use of the accumulator, which names the batch.
        """
        self._require_whole()
        self._require_same_parameters()
        read = batch_reading.read(batch, self._computation.sums.batches, self._num_samples)
        with buffers_kept(self._model) as buffers:
            self._add(read, buffers)

    def fisher(self, group: distributed.ProcessGroup | None = None) -> DiagonalFisher:
        """The mean over the samples so far. The accumulator does not change: more batches may follow.

        Args:
            group: the mean over the samples of all processes of this group, which all call this function; each may
                have added as many batches as it likes, or none. Without it, this process's own samples.

        Returns:
            As :func:`limpet.diagonal_fisher`, the same in every process. A parameter's route is the costliest of all
            processes.

        Raises:
            TypeError: ``group`` is no process group that this process belongs to.
            ValueError: the processes differ in labels, or in names, shapes or dtypes of their parameters.
            RuntimeError: there are no samples, a gradient was not finite, or an :meth:`add` was interrupted. In a
                group, every process raises.
        """
        if group is None:
            self._require_whole()
            return self._result(self._computation.sums.copies(), self._num_samples, self._routes())
        if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
            raise TypeError(f"group must be a process group of this process, got {_checks.describe(group)}")
        values: dict[str, Tensor] = {}
        error = None
        try:
            self._require_whole()
            values = self._computation.sums.copies()
        except RuntimeError as caught:  # the others wait: they are to hear of it before it is raised
            error = str(caught)
        layout = {name: (tuple(p.shape), str(wide(p.dtype))) for name, p in self._params.items()}
        mine = (error, self._labels, layout, self._num_samples, self._routes())
        every: list[Any] = [None] * distributed.get_world_size(group)
        with torch.cuda.device_of(next(iter(self._params.values()))):
            distributed.all_gather_object(every, mine, group)
            for rank, (error, labels, names, _, _) in enumerate(every):
                if error is not None:
                    raise RuntimeError(f"process {rank} of the group: {error}")
                if (labels, names) != (every[0][1], every[0][2]):
                    theirs = f"{labels!r} of {_checks.describe(names)}"
                    raise ValueError(
                        "the processes of the group must have the same labels and parameters: process 0 has "
                        f"{every[0][1]!r} of {_checks.describe(every[0][2])}, process {rank} has {theirs}"
                    )
            for value in values.values():
                if value.numel():
                    distributed.all_reduce(value, group=group)
        routes = {name: max((routes[name] for *_, routes in every), key=ROUTES.index) for name in values}
        return self._result(values, sum(count for *_, count, _ in every), routes)

    def merge(self, other: FisherAccumulator | Mapping[str, Any]) -> None:
        """Add the samples of another accumulator, or of its :meth:`state_dict`.

        Raises:
            TypeError: ``other`` is neither.
            ValueError: its labels, or the names or shapes of its parameters, are others. Nothing has changed then.
            RuntimeError: an :meth:`add` of one of them was interrupted. Nothing has changed then.
        """
        self._require_whole()
        state = self._read_state("other", other.state_dict() if isinstance(other, FisherAccumulator) else other)
        sums = state["running"]
        for name, total in state["totals"].items():
            sums[name] = sums[name] + total
        self._computation.sums.add(sums, state["num_batches"])
        self._take_over(state["routes"])
        self._num_samples += state["num_samples"]

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs; the tensors are copies, which later batches do not change.

        Raises:
            RuntimeError: an :meth:`add` was interrupted, or a gradient was not finite.
        """
        self._require_whole()
        self._computation.sums.check()
        state = {"labels": self._labels, "num_samples": self._num_samples, **self._progress()}
        for key in ("running", "totals"):
            state[key] = {name: total.clone() for name, total in state[key].items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what the accumulator was that gave this :meth:`state_dict`, and go on bit for bit, draws included.

        Raises:
            TypeError: the state, or a part of it, is not what it must be.
            ValueError: the labels, or the names or shapes of the parameters, are others. Nothing has changed then.
        """
        read = self._read_state("state", state)
        self._restart(read)
        self._seed, self._num_samples = read["seed"], read["num_samples"]

    def __repr__(self) -> str:
        return (
            f"FisherAccumulator({len(self._params)} parameters, labels={self._labels!r}; {self._num_samples} samples)"
        )

    def _new_computation(self, seed: int) -> Computation | Batched:
        objective = objective_of(self._labels, self._loss, seed)
        if self._labels in ("batched", "sampled_batched"):
            return Batched(self._model, objective, self._params, mean=self._labels == "batched")
        return Computation(self._model, objective, self._params)

    def _add(self, batch: Batch, buffers: Buffers | None) -> None:
        """Add a batch that was read, within :func:`buffers_kept`, unless it changes these buffers."""
        sums, before = self._computation.sums, self._progress()
        sums.running.touched = False
        self._torn = batch.number
        try:
            with torch.enable_grad():
                self._computation.add(batch, () if buffers is None else (buffers,))
            if buffers is not None:
                buffers.check()
        except BaseException as error:
            if not sums.running.touched:  # as if the batch had not come; a layout found on it may be wrong
                self._restart(before, sums)
            if isinstance(error, CheckpointError):
                raise RuntimeError(
                    "the model runs its functions again in backward, out of sight (torch.utils.checkpoint): "
                    "switch checkpointing off for diagonal_fisher"
                ) from error
            raise
        self._num_samples += batch.size
        self._torn = None

    def _progress(self) -> dict[str, Any]:
        """What :meth:`_restart` goes on from; nothing is copied."""
        computation = self._computation
        return {
            "seed": self._seed,
            "num_batches": computation.sums.batches,
            "loss_scale": computation.loss_scale.scale,
            "routes": self._routes(),
            "running": computation.sums.running,
            "totals": computation.sums.totals,
        }

    def _restart(self, progress: Mapping[str, Any], sums: Sums | None = None) -> None:
        """Go on from there, with its sums or these; what was found out about the model is forgotten."""
        computation = self._new_computation(progress["seed"])
        if sums is None:
            computation.sums.load(progress["running"], progress["totals"], progress["num_batches"])
        else:
            computation.sums, sums.batches = sums, progress["num_batches"]
        computation.loss_scale.scale = progress["loss_scale"]
        self._computation, self._torn, self._standing = computation, None, None
        self._take_over(progress["routes"])

    def _routes(self) -> dict[str, str]:
        slow, materialised = self._computation.slow, self._computation.materialised
        if not slow and not materialised:
            return dict.fromkeys(self._params, ROUTES[0])
        return {name: ROUTES[2 if name in slow else int(name in materialised)] for name in self._params}

    def _take_over(self, routes: Mapping[str, str]) -> None:
        """Take no cheaper routes than these."""
        self._computation.materialised.update(name for name, route in routes.items() if route == "materialised")
        self._computation.slow.update({name: self._params[name] for name, r in routes.items() if r == "per_sample"})

    def _finish(self) -> DiagonalFisher:
        """The mean, without a copy of the sums; the accumulator is used up."""
        return self._result(self._computation.sums.take(), self._num_samples, self._routes())

    @staticmethod
    def _result(sums: Mapping[str, Tensor], samples: int, routes: Mapping[str, str]) -> DiagonalFisher:
        if not samples:
            raise RuntimeError("there is no Fisher information of no samples: add a batch first")
        for total in sums.values():
            total.div_(samples)
        return DiagonalFisher(sums, samples, routes)

    def _require_whole(self) -> None:
        if self._torn is not None:
            raise RuntimeError(
                f"adding batch {self._torn} was interrupted, and the sums may hold a part of it: "
                "start again, or from an earlier state_dict"
            )

    def _require_same_parameters(self) -> None:
        """Require the parameters that there are sums for, where those sums are."""
        standing = checks.standing(self._model)
        if standing == self._standing:
            return
        params = _parameters(self._model)
        for name in [*self._params, *params]:
            p, total = params.get(name), self._computation.sums.running.get(name)
            if p is None or total is None or p is not self._params[name] or p.shape != total.shape:
                what = "is not the one that it was"
            elif p.device != total.device or wide(p.dtype) != total.dtype:
                what = f"has sums in {total.dtype} on {total.device}, and is now {_checks.describe(p.detach())}"
            else:
                continue
            raise RuntimeError(f"parameter {name!r} {what}: the parameters must stay while batches are added")
        self._standing, self._stood = standing, (list(self._model.modules()), params)

    def _read_state(self, name: str, state: Any) -> dict[str, Any]:
        """A state, checked against this accumulator; its mappings are new ones, its tensors are not."""
        if not isinstance(state, Mapping):
            raise TypeError(f"{name} must be a state_dict of a FisherAccumulator, got {_checks.describe(state)}")
        if set(state) != set(_STATE):
            raise ValueError(f"{name} must have the keys {sorted(_STATE)}, got {sorted(map(str, state))}")
        if state["labels"] != self._labels:
            raise ValueError(
                f"{name} must hold sums for labels={self._labels!r}, got {_checks.describe(state['labels'])}"
            )
        read: dict[str, Any] = {"seed": _seed(f"{name}['seed']", state["seed"])}
        for key in ("num_samples", "num_batches"):
            read[key] = _checks.integer(f"{name}[{key!r}]", state[key], minimum=0)
        read["loss_scale"] = _checks.finite_number(f"{name}['loss_scale']", state["loss_scale"], minimum=1.0)
        sums = {key: _tensors(f"{name}[{key!r}]", state[key], self._params) for key in ("running", "totals")}
        routes = state["routes"]
        if not isinstance(routes, Mapping) or routes.keys() != self._params.keys() or set(routes.values()) - {*ROUTES}:
            raise ValueError(f"{name}['routes'] must hold a route for each parameter, got {_checks.describe(routes)}")
        return {**read, **sums, "routes": dict(routes)}


def _parameters(model: Any) -> dict[str, nn.Parameter]:
    if isinstance(model, DistributedDataParallel):
        raise TypeError(
            "model must not be wrapped in DistributedDataParallel, whose forward waits for the other processes: give "
            "model.module in each of them, and sum over them by FisherAccumulator.fisher(group)"
        )
    params = tracked_parameters(model)
    for name, p in params.items():
        if hasattr(p, "device_mesh"):  # a DTensor, whose type takes long to import
            raise TypeError(f"parameter {name!r} must not be sharded over processes: each needs a whole model")
    return params


def _seed(name: str, value: Any) -> int:
    seed = _checks.integer(name, value, minimum=0)
    if seed >= 1 << 64:
        raise ValueError(f"{name} must be below 2**64, got {seed}")
    return seed


def _tensors(name: str, value: Any, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sums for these parameters; ``totals`` may be empty."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping from names to tensors, got {_checks.describe(value)}")
    if value.keys() != params.keys() and (value or not name.endswith("['totals']")):
        raise ValueError(
            f"{name} must hold the parameters of this model, not so: {sorted(value.keys() ^ params.keys())}"
        )
    for key, total in value.items():
        _checks.float_tensor(f"{name}[{key!r}]", total)
        if total.shape != params[key].shape:
            raise ValueError(
                f"{name}[{key!r}] must have shape {list(params[key].shape)}, got {_checks.describe(total)}"
            )
        if not torch.isfinite(total).all():
            raise ValueError(f"{name}[{key!r}] must be finite")
    return dict(value)
