"""Progressive networks: a column for each task, beside frozen ones that it may read (Rusu et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from limpet import _checks, _core
from limpet.methods.progressive import cache, inference, sensitivity
from limpet.methods.progressive import state as states
from limpet.methods.progressive.column import Column, Columns, Features
from limpet.methods.progressive.growth import ColumnMaker
from limpet.methods.progressive.laterals import KINDS, Activation
from limpet.methods.progressive.points import check_paths
from limpet.methods.progressive.selector import Selector
from limpet.methods.quadratic import evaluating

Task = str | int


class ProgressiveNetwork(nn.Module):
    r"""A new column for each task; earlier columns are frozen, and read through lateral connections.

    .. math:: h_i^{(k)} = f\Big(W_i^{(k)} h_{i-1}^{(k)} + U_i^{(k)}
        f\Big(\sum_{j<k} V_i^{(k:j)} \alpha_{i-1}^{(k:j)} h_{i-1}^{(j)}\Big)\Big)

    (Rusu et al. 2016, "Progressive Neural Networks", eq. 2.) Nothing is forgotten: parameters *and* buffers of a frozen
    column do not change, nor does a bit of what it answers. ::

        net = limpet.ProgressiveNetwork(make_mlp)
        for task, batches in tasks:
            net.add_column(task)
            optimizer = torch.optim.Adam(p for p in net.parameters() if p.requires_grad)
            for x, y in batches:
                loss = cross_entropy(net(x, task), y)
                ...
            net.freeze()

    A *lateral point* is a submodule of the column. With ``lateral="adapter"`` what goes into the module in earlier
    columns (the activations of the layer below) is added to what comes out of it in the new one, scaled by learned
    scalars, projected to the new column's width, past a nonlinearity and up. At a convolution V is one with a kernel of
    1, and U has the module's own kernel and stride. At a block that is neither linear nor a convolution V and U act
    on each place alone, strided where the block makes images smaller. V and U have no bias: without features nothing
    crosses. With ``"gated"`` and ``"sum"`` it is what comes *out* of the module in earlier columns that is blended with
    what comes out in the new one, projected where widths differ.

    Args:
        column_factory: makes a column's whole network, with its output layer: so each task has a head of its own. It is
            called with the keyword arguments of :meth:`add_column`.
        lateral: ``"adapter"``, the published one; ``"gated"``, :func:`limpet.ops.gated_lateral` of one earlier column
            after the other (ours; not in the paper); ``"sum"``, what earlier columns give is added as it is.
        lateral_points: paths of submodules, as ``"2"`` or ``"blocks.1"``, that every column has. None: found in an
            ``nn.Sequential``, stage by stage; a stage is a child with a weight of two dimensions or more. Adapters go
            into every stage but the first, gates and sums sit behind every stage but the last. Columns of other depths
            meet where they have stages in common, counted from the input.
        activation: f in the adapters.
        example: a small batch of inputs, needed where a lateral point is neither a linear layer nor a convolution: each
            new column is run on it once, in evaluation mode. With it all shapes are checked when a column is added.
        infer: what :meth:`forward` does when no task is given: None, an error; ``"entropy"``, it takes for each sample
            the column whose output has the lowest entropy; ``"selector"``, the one that a classifier of the first
            column's features chooses, see :meth:`learn_selector`.

    Attributes:
        columns: the columns, in order.
        tasks: their tasks.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: there is no such ``lateral`` or ``infer``, or ``lateral_points`` are none or one comes twice.

    >>> def make(width=8):
    ...     return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    >>> net = ProgressiveNetwork(make)
    >>> net.add_column("cats")
    >>> before = net(torch.ones(1, 4), "cats")
    >>> net.freeze()
    >>> net.add_column("dogs", width=6)
    >>> net(torch.ones(3, 4), "dogs").shape
    torch.Size([3, 2])
    >>> torch.equal(net(torch.ones(1, 4), "cats"), before)
    True
    """

    def __init__(
        self,
        column_factory: Callable[..., nn.Module],
        *,
        lateral: str = "adapter",
        lateral_points: Sequence[str] | None = None,
        activation: Activation = torch.relu,
        example: Any = None,
        infer: str | None = None,
    ) -> None:
        super().__init__()
        if not callable(column_factory) or isinstance(column_factory, nn.Module):
            raise TypeError(f"column_factory must be a function, got {_checks.describe(column_factory)}")
        if not callable(activation):
            raise TypeError(f"activation must be a function, got {_checks.describe(activation)}")
        self.lateral = _checks.one_of("lateral", lateral, list(KINDS))
        self.infer = infer if infer is None else _checks.one_of("infer", infer, ["entropy", "selector"])
        self._make = ColumnMaker(column_factory, lateral, check_paths(lateral_points), activation, example)
        self._arguments: list[dict[str, Any]] = []  # what the factory was called with, for a state
        self.tasks: list[Task] = []
        self.columns = Columns()
        self.selector = Selector() if infer == "selector" else None
        self._place: Tensor
        self.register_buffer(
            "_place", torch.empty(0, dtype=torch.float32), persistent=False
        )  # goes where the network is moved

    def add_column(self, task: Task, **arguments: Any) -> None:
        """Add a column for a task, to be trained from now on. Make the optimizer, or tell it, afterwards.

        The column goes where the network is, and is cast to its dtype.

        Args:
            task: its name or number.
            arguments: for the factory, as ``width=``. A state keeps them: numbers and strings can be read by
                ``torch.load(..., weights_only=True)``.

        Raises:
            TypeError: ``task`` is neither a string nor an integer, or the factory gives no module.
            ValueError: there is a column for the task; the factory gives a module, or a part of one, that another
                column has; a lateral point does not exist, or what goes in or comes out there does not fit earlier
                columns.
            RuntimeError: the last column is still being trained: :meth:`freeze` was not called.

        Whatever is raised, the network is as it was.
        """
        if isinstance(task, bool) or not isinstance(task, (str, int)):
            raise TypeError(f"task must be a string or an integer, got {_checks.describe(task)}")
        if task in self.tasks:
            raise ValueError(f"task must be a new one, got {task!r}; there are columns for {self._known()}")
        if self.columns and not self.columns[-1].frozen:
            raise RuntimeError(
                f"the column of task {self.tasks[-1]!r} is still being trained: call freeze() when its task has ended"
            )
        self._append(task, arguments, self._make(arguments, list(self.columns), self._place).train(self.training))

    def freeze(self) -> None:
        """End the last column's task: from now on nothing in it changes, whatever mode the network is in.

        Raises:
            RuntimeError: there is no column.
        """
        if not self.columns:
            raise RuntimeError("there is no column to freeze: call add_column(task)")
        self.columns[-1].freeze()

    def forward(self, x: Any, task: Task | None = None, *, features: cache.FeatureCache | None = None) -> Any:
        """What a task's column answers.

        Earlier columns that it reads run once, without a graph unless the inputs themselves require a gradient; columns
        that it does not read do not run.

        Args:
            x: what the columns are called with: a mapping gives keyword arguments, a tuple or list positional ones.
            task: whose column answers. None is for ``infer`` to decide.
            features: what the task's column reads of earlier ones for these samples: ``cache[index]``, see
                :meth:`cache_features`. Earlier columns do not run then.

        Returns:
            The column's output; where tasks were inferred, for each sample the output of its column: [N, C].

        Raises:
            ValueError: there is no column for the task; no task was given and ``infer`` is None; columns have other
                places than earlier ones at a lateral point; ``features`` are of another column or other samples, or
                beside inputs that require a gradient.
        """
        if features is not None:
            column = self.columns[self._number(task)]
            return column(x, features.read_by(column, x))[0]
        if task is not None:
            number = self._number(task)
            return self.columns.run(x, [number])[0][number]
        if self.infer is None:
            raise ValueError(f"task must be given where infer is None; there are columns for {self._known()}")
        if self.selector is not None:
            chosen = self.selector(self.columns, x)
            outputs = self.columns.run(x, set(chosen.tolist()))[0]
            return inference.chosen_rows({number: outputs[number] for number in set(chosen.tolist())}, chosen)
        outputs = self._answer_all(x)
        return inference.chosen_rows(outputs, inference.entropies(list(outputs.values())).argmin(1))

    def infer_task(self, x: Any) -> list[Task]:
        """For each sample the task that ``infer`` chooses, by the lowest entropy where that is None: [N].

        Raises:
            ValueError: there is no column, or outputs are not [N, C].
            RuntimeError: the selector has not learned every column's task.
        """
        with torch.no_grad():
            if self.selector is not None:
                chosen = self.selector(self.columns, x)
            else:
                chosen = inference.entropies(list(self._answer_all(x).values())).argmin(1)
        return [self.tasks[number] for number in chosen.tolist()]

    def learn_selector(self, batches: Iterable[Any], task: Task) -> None:
        """Let the selector of ``infer="selector"`` learn a task, from the task's own data alone.

        Call it once for each task, at any time after the first column is frozen, for a task's data as a rule when the
        task ends. One pass of the first column, and a system of as many equations as that has features.

        Args:
            batches: ``(inputs, labels)``, labels int64 [N].
            task: whose they are.

        Raises:
            TypeError: a batch is no pair.
            ValueError: there is no such task, no batch, or it was learned before; labels are not [N].
            RuntimeError: the network has no selector, or its first column is still being trained.
        """
        if self.selector is None:
            raise RuntimeError(f"there is no selector: infer must be 'selector', it is {self.infer!r}")
        number = self._number(task)
        if not self.columns[0].frozen:
            raise RuntimeError("the selector looks at the first column, which is still being trained: call freeze()")
        self.selector.learn(self.columns, number, batches)

    def cache_features(self, inputs: Any, task: Task, *, batch_size: int = 256) -> cache.FeatureCache:
        """Compute once what a task's column reads of earlier ones, for a data set that fits in memory.

        ::

            print(net.cache_nbytes(x, "dogs"))
            cache = net.cache_features(x, "dogs")
            for index in torch.randperm(len(x)).split(128):
                loss = cross_entropy(net(x[index], "dogs", features=cache[index]), y[index])

        Each step then costs the task's own column. The cache does for one task: a new column needs another. It must not
        be used with inputs that change from epoch to epoch. What it gives was computed in batches of ``batch_size``;
        in batches cut otherwise the last bits of a matrix product may differ.

        Args:
            inputs: all samples, as :meth:`forward` takes them: tensors [N, *]. Batches of them are moved to where the
                network is, and there the features lie.
            task: whose column reads.
            batch_size: how many samples run at once.

        Raises:
            ValueError: there is no such task or no sample; the features do not fit in memory.
        """
        number = self._number(task)
        return cache.fill(self.columns, number, inputs, _checks.integer("batch_size", batch_size, minimum=1))

    def cache_nbytes(self, inputs: Any, task: Task) -> int:
        """How many bytes :meth:`cache_features` would take for these inputs; one sample runs for it."""
        return cache.nbytes(self.columns, self._number(task), inputs)

    def parameters_per_column(self) -> dict[Task, int]:
        """How many parameters each task's column has, laterals included."""
        sizes = (sum(p.numel() for p in column.parameters()) for column in self.columns)
        return dict(zip(self.tasks, sizes, strict=True))

    def lateral_sensitivity(
        self, batches: Iterable[Any], task: Task, *, measure: str = "fisher"
    ) -> sensitivity.LateralSensitivity:
        """How much a task's answers depend on each column's features, point by point (Rusu et al. 2016, section 3).

        At a lateral point the task's column meets its own features and, through its laterals, those of earlier
        columns. Each is measured *as it is read there*: what a feature does on other ways does not count, so that a
        share tells what a lateral carries. Features are in units of their own standard deviation over the data.

        Args:
            batches: ``(inputs, labels)`` of the task; outputs must be [N, C].
            task: whose column reads.
            measure: ``"fisher"``, the diagonal Fisher information of the features, expected over the model's labels:
                one backward pass for each class, labels are not read. ``"perturbation"``, ``1 / sigma^2`` of the noise
                that takes half of the accuracy above chance; features and batches are held in memory.

        Returns:
            Shares [points, columns] that sum to 1 in each point, the last column being the task's own.

        Raises:
            ValueError: there is no such task or ``measure``; there are no batches; outputs are not [N, C].
        """
        _checks.one_of("measure", measure, list(sensitivity.MEASURES))
        number = self._number(task)
        column = self.columns[number]

        @torch.no_grad()
        def earlier(x: Any) -> dict[int, Features]:
            return self.columns.run(x, column.sources)[1]

        with evaluating(self):
            shares = sensitivity.MEASURES[measure](column, number, earlier, batches)
        paths = tuple(ends.path for ends in column.points)
        return sensitivity.LateralSensitivity(measure, task, paths, tuple(self.tasks[: number + 1]), shares)

    def prune_laterals(self, found: sensitivity.LateralSensitivity, threshold: float) -> list[tuple[str, Task]]:
        """Remove the last column's laterals whose share is below a threshold, with their parameters.

        A column that no longer reads another, directly or through others, does not run it either.

        Args:
            found: what :meth:`lateral_sensitivity` gave for the last column's task.
            threshold: in [0, 1].

        Returns:
            What was removed: the point's path and the task of the column that was read there.

        Raises:
            TypeError: ``threshold`` is no number.
            ValueError: it is out of range, or ``found`` is of another task than the last column's: earlier columns stay
                as they are.
        """
        if not 0.0 <= _checks.finite_number("threshold", threshold) <= 1.0:
            raise ValueError(f"threshold must lie in [0, 1], got {threshold!r}")
        if not self.tasks or found.tasks != tuple(self.tasks):
            raise ValueError(
                f"found must be of the last column's task, got that of {found.task!r}; columns: {self._known()}"
            )
        column = self.columns[-1]
        weak = {(point, source) for point, source in column.pairs if found.shares[point, source] < threshold}
        column.prune(weak)
        return [(column.points[point].path, self.tasks[source]) for point, source in sorted(weak)]

    def requires_grad_(self, requires_grad: bool = True) -> ProgressiveNetwork:
        """Change whether the last column's parameters require a gradient; those of frozen ones never do."""
        for column in self.columns:
            column.requires_grad_(requires_grad and not column.frozen)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """What makes the columns anew: tasks, the factory's arguments, which laterals there are, and how far it is."""
        return states.of(self.columns, self.tasks, self._arguments, self.lateral)

    def set_extra_state(self, state: Any) -> None:
        """Make the columns that a state has and this network lacks; ``load_state_dict`` fills them.

        Raises:
            ValueError: the state is none, or of another ``lateral``; this network has other columns, or laterals are
                gone here that the state has, or its last column is frozen and the state's is not; or as
                :meth:`add_column`. The columns are as they were then.
        """
        states.check(state, self.columns, self.tasks, self._arguments, self.lateral)
        columns = list(self.columns)
        for arguments in state["arguments"][len(columns) :]:
            columns.append(self._make(arguments, columns, self._place).train(self.training))
        gone = states.pruned(state, columns)
        for column, pairs in zip(columns, gone, strict=True):
            column.prune(pairs)
        for task, arguments, column in zip(state["tasks"], state["arguments"], columns, strict=True):
            if task not in self.tasks:
                self._append(task, arguments, column)
        if self.columns and not state["training"]:
            self.freeze()

    def extra_repr(self) -> str:
        """The kind of laterals, and the tasks."""
        return f"lateral={self.lateral!r}, tasks={self.tasks}"

    def _known(self) -> str:
        return states.named(self.tasks)

    def _number(self, task: Task | None) -> int:
        if task is None or task not in self.tasks:
            raise ValueError(f"task must be one that has a column ({self._known()}), got {_checks.describe(task)}")
        return self.tasks.index(task)

    def _append(self, task: Task, arguments: Mapping[str, Any], column: Column) -> None:
        if self.columns:
            self.freeze()
        if self._place.device.type == "cpu":
            # glibc is to keep what one step frees for the next, up to 1 GB: otherwise the system clears the pages of
            # the laterals' gradients again in every step, a tenth of a step of five columns of three layers of 512.
            _core.keep_freed_memory()
        self.columns.append(column)
        self.tasks.append(task)
        self._arguments.append(dict(arguments))

    def _answer_all(self, x: Any) -> dict[int, Any]:
        if not self.tasks:
            raise ValueError("there must be a column to infer a task, call add_column(task)")
        return self.columns.run(x, range(len(self.tasks)))[0]
