"""Mistakes with progressive networks: a clear error, and the network as it was."""

import copy
import re

import pytest
import torch
from torch import nn

from columns import grown, mlp
from limpet import ProgressiveNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


def grow(net, tasks):
    for task in tasks:
        net.add_column(task)
        net.freeze()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"column_factory": mlp()}, TypeError, "column_factory must be a function, got Sequential"),
        ({"column_factory": 3}, TypeError, "column_factory must be a function, got int 3"),
        ({"lateral": "gate"}, ValueError, "lateral must be one of 'adapter', 'gated', 'sum', got str 'gate'"),
        ({"lateral_points": "2"}, TypeError, "lateral_points must be a sequence of submodule paths, got str '2'"),
        ({"lateral_points": [2]}, TypeError, "lateral_points[0] must be a submodule's path, got int 2"),
        ({"lateral_points": []}, ValueError, "one or more submodules, each once, got []"),
        ({"lateral_points": ["2", "2"]}, ValueError, "one or more submodules, each once, got ['2', '2']"),
        ({"activation": "relu"}, TypeError, "activation must be a function, got str 'relu'"),
        ({"infer": "oracle"}, ValueError, "infer must be one of 'entropy', 'selector', got str 'oracle'"),
    ],
)
def test_settings(arguments, error, words):
    with pytest.raises(error, match=re.escape(words)):
        ProgressiveNetwork(**{"column_factory": mlp, **arguments})


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("b", "task must be one that has a column ('a'), got str 'b'"),
        (None, "task must be given where infer is None; there are columns for 'a'"),
        (0, "task must be one that has a column ('a'), got int 0"),
    ],
)
def test_unknown_tasks(task, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        grown(mlp, "a")(torch.zeros(1, 5), task)


def test_a_column_is_frozen_before_the_next():
    net = ProgressiveNetwork(mlp)
    with pytest.raises(RuntimeError, match="there is no column to freeze"):
        net.freeze()
    with pytest.raises(ValueError, match="there are columns for no task yet"):
        net(torch.zeros(1, 5))
    net.add_column("a")
    with pytest.raises(RuntimeError, match=r"the column of task 'a' is still being trained: call freeze\(\)"):
        net.add_column("b")
    net.freeze()
    with pytest.raises(ValueError, match="task must be a new one, got 'a'"):
        net.add_column("a")
    with pytest.raises(TypeError, match=r"task must be a string or an integer, got float 1\.5"):
        net.add_column(1.5)


SHARED = nn.Linear(5, 4)
MADE = mlp()


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: MADE, "must give a new module each time, got that of column 0"),
        (lambda: nn.Sequential(SHARED, nn.Linear(4, 2)), "got one that shares the module '0' with column 0"),
    ],
)
def test_factories_that_share(factory, words):
    net, x = ProgressiveNetwork(factory), torch.ones(2, 5)
    grow(net, "a")
    before = net(x, "a")
    with pytest.raises(ValueError, match=re.escape(words)):
        net.add_column("b")
    assert net.tasks == net.state_dict()["_extra_state"]["tasks"] == ["a"]
    assert torch.equal(net(x, "a"), before)


@pytest.mark.parametrize(
    ("factory", "options", "error", "words"),
    [
        (lambda: nn.Linear(5, 2), {}, ValueError, "lateral_points must name submodules where a column is no nn.Seq"),
        (lambda: nn.Sequential(nn.Linear(5, 2)), {}, ValueError, "fewer than two children with weights"),
        (mlp, {"lateral_points": ["blocks.1"]}, ValueError, "must name submodules of the column ('0', '1', '2', '3'"),
        (mlp, {"lateral_points": ["1"]}, ValueError, "example must be given: the lateral point '1' is a ReLU"),
        (lambda: "net", {}, TypeError, "column_factory must give a torch.nn.Module, got str 'net'"),
        (lambda width: mlp(width), {}, TypeError, "missing 1 required positional argument: 'width'"),
    ],
)
def test_factories(factory, options, error, words):
    net = ProgressiveNetwork(factory, **options)
    with pytest.raises(error, match=re.escape(words)):
        net.add_column("a")
    assert net.tasks == []
    assert len(net.columns) == 0


def strided(stride=1):
    images = [nn.Conv2d(1, 2, 3, stride), nn.Conv2d(2, 2, 3, padding=1)]
    return nn.Sequential(*images, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))


def test_places_that_differ():
    example = torch.zeros(1, 1, 9, 9)
    net = ProgressiveNetwork(strided, example=example)
    net.add_column("a")
    net.freeze()
    words = "same places at a lateral point, '1' of the new column and '1' of column 0 have [N, C, *, *] with [4, 4]"
    with pytest.raises(ValueError, match=re.escape(words)):
        net.add_column("b", stride=2)
    assert net.tasks == ["a"]
    unseen = ProgressiveNetwork(strided)
    unseen.add_column("a")
    unseen.freeze()
    unseen.add_column("b", stride=2)  # only an example would have shown it
    with pytest.raises(ValueError, match=re.escape("'1' has [1, 2, 4, 4] and column 0 [1, 2, 7, 7] there")):
        unseen(example, "b")
    assert unseen(example, "a").shape == (1, 2)
    mixed = ProgressiveNetwork(lambda image: strided() if image else nn.Sequential(nn.Linear(9, 2), nn.Linear(2, 2)))
    mixed.add_column("a", image=True)
    mixed.freeze()
    with pytest.raises(ValueError, match=re.escape("have [N, *, D] and [N, C, *, *]")):
        mixed.add_column("b", image=False)


class Twice(nn.Module):
    def __init__(self, times):
        super().__init__()
        self.inner, self.times = nn.Linear(5, 5), times

    def forward(self, x):
        for _ in range(self.times):
            x = self.inner(x)
        return x


def test_points_run_once():
    net = grown(lambda: Twice(2), "a", lateral_points=["inner"])
    with pytest.raises(RuntimeError, match="must run once in a forward, 'inner' ran again"):
        net(torch.zeros(1, 5), "a")
    with pytest.raises(ValueError, match="must run in the column's forward, 'inner' did not"):
        grown(lambda: Twice(0), "a", lateral_points=["inner"], example=torch.zeros(1, 5))
    net = grown(mlp, "ab")
    with pytest.raises(RuntimeError, match="runs through its ProgressiveNetwork only"):
        net.columns[1].network(torch.zeros(1, 5))


class EverySecond(nn.Module):
    def forward(self, x):
        return x[:, ::2]


@pytest.mark.parametrize(
    ("module", "words"), [(nn.Flatten(0), "'1' turns [2, 6, 5] into [60]"), (EverySecond(), "'1' makes [3] of [6]")]
)
def test_blocks_that_laterals_cannot_follow(module, words):
    net = ProgressiveNetwork(
        lambda: nn.Sequential(nn.Linear(5, 5), copy.copy(module)), lateral_points=["1"], example=torch.zeros(2, 6, 5)
    )
    with pytest.raises(ValueError, match=re.escape(words)):
        grow(net, "ab")


def test_inference_needs_outputs_of_classes():
    net = grown(lambda outputs=3: mlp(outputs=outputs), "a", infer="entropy")
    net.freeze()
    net.add_column("b", outputs=2)
    x = torch.randn(4, 5)
    assert set(net.infer_task(x)) <= {"a", "b"}
    with pytest.raises(ValueError, match=re.escape("got [[4, 3], [4, 2]]: use infer_task")):
        net(x)
    with pytest.raises(ValueError, match="to infer a task, column 0 gives"):
        net(torch.randn(4, 2, 5))
    with pytest.raises(ValueError, match="there must be a column to infer a task"):
        ProgressiveNetwork(mlp, infer="entropy")(x)
