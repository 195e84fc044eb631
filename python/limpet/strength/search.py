"""``suggest_strength``: successive halving over a grid of strengths."""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from torch import nn

from limpet import _checks, ops
from limpet.strength.candidate import Candidate
from limpet.strength.randomness import RandomState
from limpet.strength.result import StrengthSuggestion, Trial

_log = logging.getLogger("limpet")

_DECADES = 4  # of the grid, to either side of its centre
_MAX_JOINED = 4  # strengths that may join a search


class Regularizer(Protocol):
    """What can be searched for: :class:`limpet.EWC` and whatever else has these two and can be deep-copied."""

    model: nn.Module
    strength: float


R = TypeVar("R", bound=Regularizer)


def suggest_strength(
    regularizer: R,
    train: Callable[[nn.Module, R], Iterator[Any]],
    evaluate: Callable[[nn.Module], tuple[float, float]],
    *,
    steps: int,
    strengths: Sequence[float] | None = None,
    rungs: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> StrengthSuggestion:
    r"""Find the strength with which a new task is learnt and the earlier ones are kept.

    The model has learnt the earlier tasks, and ``regularizer`` protects them. Copies of both learn the new task, each
    copy with a strength of its own, and are compared by the mean of retained and new accuracy on held-out data. (With
    one task of each kind that is the average accuracy which the field reports. A harmonic mean would depend on where
    chance lies.)

    It is successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) for an ordered grid. All strengths are
    trained for a part of the steps; the half around the best, three at least, goes on from where it stands to twice as
    many; in the last rung the training is complete. Neighbours go on, not the highest scores, because forgetting comes
    late: strengths that are too weak look alike at first, and would push out the right one. For the same reason a tie
    goes to the stronger in the rungs before the last. In the last it goes to the weaker.

    Where the best of a rung has no neighbour on one side, and is better than the one on the other, the strength beyond
    joins, up to four in a search. So the answer has, but for these limits, been compared with both neighbours after a
    full training. ``n`` strengths in ``r`` rungs cost about ``n (r + 1) / 2^r`` full trainings (nine in three rungs 5,
    since halves are rounded up), and strengths that join a part of one or one each. In the first rung all candidates
    are in memory: model, regularizer, gradients and optimizer of each.

    Without ``strengths`` the grid is scale-free: it is centred on the decade where the mean curvature of the penalty,
    ``strength * mean(importances)``, is 1, and goes four decades to either side. So it fits every kind of Fisher
    information, whose scales differ by orders of magnitude.

    Args:
        regularizer: protects the earlier tasks in ``regularizer.model``. Neither is changed. It is copied with its
            model by ``copy.deepcopy``. A copy belongs to no optimizer: what works by hooks on one is attached in
            ``train``.
        train: ``train(model, regularizer)``, a generator function: an ordinary training loop on the new task that
            makes its own optimizer and has a ``yield`` after each step, outside of ``no_grad`` and ``autocast``. It
            gets a copy of the model, and the copy of the regularizer that protects it, with the strength already set.
        evaluate: ``evaluate(model)`` gives the accuracy on earlier tasks and on the new one, both in [0, 1], on data
            that are neither trained nor tested on. It is called in evaluation mode and without gradients.
        steps: how many yields are a full training. A loop that ends sooner has had its full training then.
        strengths: the grid, all above 0; where its best is at an end, it is gone on with in its own ratio there.
        rungs: how many; 1 trains every strength in full.
        seed: each candidate starts from it: torch's generators, NumPy's global one and Python's. All come back as they
            were.
        progress: called after each step with the steps done and the steps there will be, over all candidates.

    Returns:
        ``best``, the ``table`` of all trials, and ``plot(path)``. A strength whose training diverged (a parameter or
        an accuracy is NaN or infinite) is dropped, and says so in the table.

    Raises:
        TypeError: an argument is not what it must be, ``train`` is no generator function, or ``evaluate`` does not
            return two numbers.
        ValueError: a number is out of range; there are no importances to centre the grid on; ``train`` never yields;
            an accuracy is outside [0, 1].
        RuntimeError: the training diverged with every strength; ``train`` yields within ``no_grad`` or ``autocast``.

    Warns:
        UserWarning: the best strength is at an end of all that were tried; in the first rung, all did the same.

    >>> from limpet import EWC
    >>> model = nn.Linear(1, 1, bias=False)
    >>> ewc = EWC(model, strength=0.0)
    >>> ewc.consolidate([(torch.ones(1, 1), torch.zeros(1))], loss=lambda out, y: out[:, 0] - y)
    >>> old = model.weight.item()
    >>> def train(model, ewc):
    ...     for _ in range(200):  # the new task wants the weight one higher: (w - old - 1)^2 / 2
    ...         model.weight.grad = model.weight.detach() - old - 1
    ...         ewc.add_penalty_grad_()
    ...         with torch.no_grad():
    ...             _ = model.weight.sub_(model.weight.grad / (1 + ewc.strength))
    ...         yield
    >>> def evaluate(model):
    ...     moved = model.weight.item() - old
    ...     return 1 - moved**2, 1 - (moved - 1) ** 2
    >>> suggest_strength(ewc, train, evaluate, steps=200).best
    1.0
    """
    _check(regularizer, train=train, evaluate=evaluate, progress=progress)
    _checks.integer("steps", steps, minimum=1)
    _checks.integer("rungs", rungs, minimum=1)
    _checks.integer("seed", seed, minimum=0)
    grid = _default_grid(regularizer) if strengths is None else _grid(strengths)
    devices = sorted({p.device for p in regularizer.model.parameters() if p.device.type == "cuda"}, key=str)

    def candidate(strength: float) -> Candidate:
        return Candidate(regularizer, strength, train, seed, devices)

    outside = RandomState(devices)
    search = _Search(candidate, evaluate, grid, [math.ceil(steps / 2**k) for k in reversed(range(rungs))], progress)
    try:
        found = search.run()
    finally:
        search.close()
        outside.restore()
    for end, strength in (("weakest", min(search.tried)), ("strongest", max(search.tried))):
        if found.best == strength:
            warnings.warn(f"the best strength, {strength:g}, is the {end} of all that were tried", stacklevel=2)
    if len(grid) > 1 and len({(trial.retained, trial.new) for trial in found.table if trial.rung == 1}) == 1:
        warnings.warn(
            "no strength made a difference in the first rung: does train use the regularizer that it is given?",
            stacklevel=2,
        )
    return found


class _Search:
    """The candidates that are still in the running, and all strengths that ever were."""

    def __init__(
        self,
        candidate: Callable[[float], Candidate],
        evaluate: Callable[[nn.Module], tuple[float, float]],
        grid: Sequence[float],
        budgets: Sequence[int],
        progress: Callable[[int, int], object] | None,
    ) -> None:
        self._candidate, self._evaluate, self._budgets, self._progress = candidate, evaluate, budgets, progress
        self.tried = list(grid)  # ascending
        self._alive: dict[float, Candidate] = {}
        self._diverged: set[float] = set()
        self._joined = 0
        self._done = self._planned = 0

    def run(self) -> StrengthSuggestion:
        """All rungs."""
        table: list[Trial] = []
        going_on = list(self.tried)
        for rung, budget in enumerate(self._budgets, 1):
            last = rung == len(self._budgets)
            self._planned = self._done + self._left(len(going_on), rung)
            trials = {strength: self._try(strength, rung) for strength in going_on}
            best = _best(trials.values(), last)
            while (beyond := self._beyond(trials, best)) is not None:
                self._joined += 1
                self.tried = sorted({*self.tried, beyond})
                self._planned += budget
                trials[beyond] = self._try(beyond, rung)
                best = _best(trials.values(), last)
            table += sorted(trials.values(), key=lambda trial: trial.strength)
            going_on = _half_around(best.strength, sorted(self._alive))
            for strength in self._alive.keys() - set(going_on):
                self._alive.pop(strength).close()
        return StrengthSuggestion(best.strength, tuple(table))

    def close(self) -> None:
        """Let go of every candidate."""
        while self._alive:
            self._alive.popitem()[1].close()

    def _try(self, strength: float, rung: int) -> Trial:
        """Train a strength up to a rung's steps, from where it stands, and measure it."""
        if strength not in self._alive:
            self._alive[strength] = self._candidate(strength)
        candidate = self._alive[strength]
        candidate.train(self._budgets[rung - 1], self._advance)
        trial = candidate.evaluate(rung, self._evaluate)
        if trial.diverged:
            _log.warning("suggest_strength: the training with strength %g diverged; it is dropped", strength)
            self._diverged.add(strength)
            self._alive.pop(strength).close()
        return trial

    def _advance(self) -> None:
        """Count a step."""
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._planned)

    def _left(self, num: int, rung: int) -> int:
        """The steps that ``num`` candidates take from the start of a rung to the end, if none joins."""
        steps = 0
        for before, budget in itertools.pairwise([0, *self._budgets][rung - 1 :]):
            steps += num * (budget - before)
            num = _half(num)
        return steps

    def _beyond(self, trials: Mapping[float, Trial], best: Trial) -> float | None:
        """The strength beyond the best one, where that has no neighbour on one side and beats the one on the other."""
        here = sorted(trials)
        at = here.index(best.strength)
        for outward in (-1, 1):
            if self._joined == _MAX_JOINED or 0 <= at + outward < len(here):
                continue
            if 0 <= at - outward < len(here) and trials[here[at - outward]].score >= best.score:
                continue
            beyond = self._neighbour(best.strength, outward)
            if beyond not in self._diverged and 0 < beyond < math.inf:
                return beyond
        return None

    def _neighbour(self, strength: float, outward: int) -> float:
        """The next strength on one side: one that was left behind in an earlier rung, or a new one."""
        at = self.tried.index(strength)
        if 0 <= at + outward < len(self.tried):
            return self.tried[at + outward]
        ratio = 10.0**outward if len(self.tried) == 1 else strength / self.tried[at - outward]
        return float(f"{strength * ratio:.12g}")  # decades stay decades


def _best(trials: Iterable[Trial], last: bool) -> Trial:
    """The highest score; of equal ones the stronger, in the last rung the weaker."""
    finite = [trial for trial in trials if not trial.diverged]
    if not finite:
        raise RuntimeError("the training diverged with every strength: its loss, learning rate or data are at fault")
    return max(finite, key=lambda trial: (trial.score, -trial.strength if last else trial.strength))


def _half(num: int) -> int:
    """How many of a rung's candidates go on: three at least, so that the best has both neighbours."""
    return min(num, max(3, math.ceil(num / 2)))


def _half_around(best: float, strengths: Sequence[float]) -> list[float]:
    """The half of ascending strengths that has the best one in its middle, as nearly as their ends allow."""
    keep = _half(len(strengths))
    first = strengths.index(best) - (keep - 1) // 2
    first = max(0, min(first, len(strengths) - keep))
    return list(strengths[first : first + keep])


def _default_grid(regularizer: Regularizer) -> list[float]:
    """Decades around the one where ``strength * mean(importances)`` is 1."""
    params = dict(regularizer.model.named_parameters())
    held = getattr(regularizer, "importances", None) or {}
    importances = {
        name: tensor if tensor.is_floating_point() else ops.unpack_importance(tensor, params[name].shape)
        for name, tensor in held.items()
    }
    total = sum(float(tensor.double().sum()) for tensor in importances.values())
    if not 0 < total < math.inf:
        raise ValueError(
            "strengths must be given where regularizer.importances do not say the scale: "
            f"their sum is {total:g} over {len(importances)} parameters; has a task been consolidated?"
        )
    mean = total / sum(tensor.numel() for tensor in importances.values())
    centre = round(-math.log10(mean))
    return [float(f"1e{centre + decade}") for decade in range(-_DECADES, _DECADES + 1)]


def _grid(strengths: Any) -> list[float]:
    """Check the strengths given, and sort them."""
    if isinstance(strengths, (str, Mapping)) or not isinstance(strengths, Sequence):
        raise TypeError(f"strengths must be a sequence of numbers, got {_checks.describe(strengths)}")
    grid = sorted({_checks.finite_number(f"strengths[{i}]", value) for i, value in enumerate(strengths)})
    if not grid or grid[0] <= 0:
        raise ValueError(f"strengths must be one or more numbers above 0, got {_checks.describe(strengths)}")
    return grid


def _check(regularizer: Any, **functions: Any) -> None:
    """Check what can be checked before any work is done."""
    if not isinstance(getattr(regularizer, "model", None), nn.Module) or not hasattr(regularizer, "strength"):
        raise TypeError(
            "regularizer must have a strength and a model that is a torch.nn.Module, "
            f"got {_checks.describe(regularizer)}"
        )
    for name, function in functions.items():
        if not callable(function) and not (name == "progress" and function is None):
            raise TypeError(f"{name} must be callable, got {_checks.describe(function)}")
