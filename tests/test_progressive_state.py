"""Progressive networks are saved, loaded into new ones, and grow on."""

import copy
import io
import re

import pytest
import torch
from torch import nn

from columns import grown, mlp, normalised, parts, train
from limpet import ProgressiveNetwork

pytestmark = pytest.mark.usefixtures("one_thread")


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@pytest.mark.parametrize("lateral", ["adapter", "gated", "sum"])
def test_saved_loaded_and_grown_on(lateral):
    net = grown(normalised, "ab", lateral=lateral)
    train(net, "b")
    net.freeze()
    net.add_column("wide", width=12)
    train(net, "wide")
    other = ProgressiveNetwork(normalised, lateral=lateral)
    other.load_state_dict(saved_and_loaded(net.state_dict()))
    assert other.tasks == ["a", "b", "wide"]
    x = torch.randn(6, 5)
    for one in (net, other):
        one.eval()
        torch.manual_seed(3)
        train(one, "wide")  # it was still being trained
        one.freeze()
        one.add_column("d")
        torch.manual_seed(4)
        train(one, "d")
        one.eval()
    for task in ("a", "b", "wide", "d"):
        assert torch.equal(other(x, task), net(x, task))
    for number in range(4):
        theirs = parts(other.columns[number])
        assert all(torch.equal(theirs[name], tensor) for name, tensor in parts(net.columns[number]).items())


def test_a_part_of_a_larger_model():
    model = nn.ModuleDict({"net": grown(mlp, "ab")})
    model["net"].freeze()
    other = nn.ModuleDict({"net": ProgressiveNetwork(mlp)})
    other.load_state_dict(saved_and_loaded(model.state_dict()))
    x = torch.randn(6, 5)
    assert torch.equal(other["net"](x, "b"), model["net"](x, "b"))
    with pytest.raises(ValueError, match=r"load it into a new network"):
        other.load_state_dict(nn.ModuleDict({"net": grown(mlp, "ab")}).state_dict())


def test_a_network_with_some_of_the_columns_gets_the_others():
    net = grown(mlp, "abc")
    net.freeze()
    other = grown(mlp, "a")
    other.load_state_dict(net.state_dict())
    x = torch.randn(6, 5)
    assert torch.equal(other(x, "c"), net(x, "c"))
    assert not any(p.requires_grad for p in other.parameters())


def test_pruned_laterals_stay_pruned():
    net = grown(mlp, "abc")
    found = net.lateral_sensitivity([(torch.randn(20, 5), torch.zeros(20))], "c")
    found.shares[:, :2] = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    assert net.prune_laterals(found, 0.1) == [("2", "b"), ("4", "a"), ("4", "b")]
    assert [name for name, _ in net.columns[2].laterals.named_parameters()] == [
        "0.sources.0.alpha",
        "0.sources.0.projection.weight",
        "0.up.weight",
    ]
    other = ProgressiveNetwork(mlp)
    other.load_state_dict(net.state_dict())
    x = torch.randn(6, 5)
    assert torch.equal(other(x, "c"), net(x, "c"))
    other.freeze()
    other.add_column("d")
    assert len(other.columns[3].pairs) == 6


def state_of(net, **changes):
    state = net.state_dict()
    state["_extra_state"] = {**state["_extra_state"], **changes}
    return state


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lateral": "sum"}, "state must be of lateral='adapter', got 'sum'"),
        ({"tasks": ["b", "a"]}, "state must begin with the columns of this network ('a')"),
        ({"arguments": [{"width": 4}, {}]}, "state must begin with the columns of this network ('a')"),
        ({"laterals": [[], [[0, 0], [1, 0], [2, 0]]]}, "no laterals that are not here, got [(2, 0)]"),
        ({"more": 1}, "must have the keys"),
    ],
)
def test_refused_states_leave_the_columns(changes, words):
    net, state = grown(mlp, "a"), state_of(grown(mlp, "ab"), **changes)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=re.escape(words)):
        net.load_state_dict(state)
    assert net.tasks == ["a"]
    assert len(net.columns) == 1
    assert not net.columns[0].frozen
    assert before.keys() == net.state_dict().keys()


def test_a_factory_that_fails_leaves_the_network():
    made = []

    def once():
        if made:
            raise RuntimeError("no more")
        made.append(mlp())
        return made[0]

    net = ProgressiveNetwork(once)
    with pytest.raises(RuntimeError, match="no more"):
        net.load_state_dict(grown(mlp, "ab").state_dict())
    assert net.tasks == []
    assert len(net.columns) == 0
