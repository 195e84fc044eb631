"""Regularizers of models that are sharded over two processes, against whole models."""

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import sharded_runs
from limpet import EWC, MemoryAwareSynapses, RWalk, SynapticIntelligence
from sharded_runs import DAMPING, STRENGTH, data, loaded, moved, net, optimizer_of
from si_training import backward, by_hand, sgd
from tolerances import assert_close


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return sharded_runs.run(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(params=[0, 1], ids=["process 0", "process 1"])
def found(processes, request):
    return processes[request.param]


def whole(kind, dtype=torch.float64):
    model = net(dtype)
    return model, loaded(kind, model, moved(net(dtype)))


def assert_all_close(got, want, dtype=None):
    assert got.keys() == want.keys()
    for name in want:
        assert want[name].any()
        assert_close(got[name], want[name], dtype)


def grads(model, scale=1):
    return {name: scale * p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [EWC, MemoryAwareSynapses])
def test_the_penalty_is_the_sum_over_the_parts(found, kind):
    got = found["penalty"][kind.__name__]
    model, regularizer = whole(kind)
    value = regularizer.penalty()
    value.backward()
    assert_close(got["value"], value)
    assert_close(got["added"], value)
    assert_all_close(got["grads"], grads(model, 2))
    assert_all_close(got["grads after"], grads(model, 3))


def test_each_process_holds_its_own_part(found):
    assert found["penalty"]["EWC"]["own part"] is True


def test_frozen_parameters_count_and_get_no_gradient(found):
    assert_close(found["frozen"]["value"], whole(EWC)[1].penalty())
    assert found["frozen"]["untouched"] is True


def test_bfloat16_parameters(found):
    model, ewc = whole(EWC, torch.bfloat16)
    assert_close(found["narrow_floats"]["value"], ewc.add_penalty_grad_())
    assert_all_close(found["narrow_floats"]["grads"], grads(model))


@pytest.mark.parametrize("mesh", ["all", "hybrid"])
def test_what_is_replicated_counts_once(found, mesh):
    model, ewc = whole(EWC)
    value = ewc.penalty()
    value.backward()
    assert_close(found["replicated"][mesh]["value"], value)
    assert_all_close(found["replicated"][mesh]["grads"], grads(model))


def test_the_penalty_in_the_loss(found):
    assert "parameter 'gain' is whole at present" in found["in_the_loss"]["refused"]
    assert "model.reshard()" in found["in_the_loss"]["refused"]
    model, ewc = whole(EWC)
    x, y = data()[0][0]
    (F.cross_entropy(model(x), y) + ewc.penalty()).backward()
    assert_all_close(found["in_the_loss"]["grads"], grads(model))


@pytest.mark.parametrize("how", ["hooks", "by hand", "sharded later"])
def test_synaptic_intelligence_equals_the_formulas(found, how):
    theta, importances = by_hand(net(), data(), sgd(), STRENGTH, DAMPING)
    assert_all_close(found["integrals"][how]["theta"], theta, torch.float64)
    for name, want in importances.items():
        torch.testing.assert_close(found["integrals"][how]["importances"][name], want, rtol=1e-9, atol=1e-12)


def test_what_moves_parameters_between_steps_is_no_path(found):
    model = net()
    optimizer = optimizer_of(model)
    si = SynapticIntelligence(model, optimizer, strength=STRENGTH)
    for batch in data()[0]:
        backward(model, batch, optimizer)
        optimizer.step()
        with torch.no_grad():
            for param in model.parameters():
                param.mul_(0.9)
    for name, want in si.integrals.items():
        torch.testing.assert_close(found["between_steps"][name], want, rtol=1e-9, atol=1e-12)


def test_rwalk_equals_the_whole_run(found):
    model = net()
    optimizer = optimizer_of(model)
    rwalk = RWalk(model, optimizer, strength=STRENGTH, interval=4)
    for batches in data():
        for batch in batches:
            backward(model, batch, optimizer)
            optimizer.step()
        rwalk.consolidate()
    for name, want in rwalk.importances.items():
        assert want.any() or name == "gain"
        torch.testing.assert_close(found["walk"]["importances"][name], want, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(
            found["walk"]["theta"][name], model.get_parameter(name).detach(), rtol=1e-9, atol=1e-12
        )


def test_a_composite(found):
    model, ewc = whole(EWC)
    mas = loaded(MemoryAwareSynapses, model, moved(net(), seed=3))
    value = ewc.penalty() + mas.penalty()
    value.backward()
    assert_close(found["composite"]["value"], value)
    assert_close(found["composite"]["parts"], value)
    assert_all_close(found["composite"]["grads"], grads(model))


@pytest.mark.parametrize("how", ["parts", "whole", "checkpoint"])
def test_resumed_in_the_middle_of_a_task_bit_for_bit(found, how):
    for kind in ("theta", "importances"):
        for name, want in found["resumed"]["straight on"][kind].items():
            assert torch.equal(found["resumed"][how][kind][name], want)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("EWC", "TypeError: parameter 'gain' must not be sharded over processes while importances are measured"),
        ("MemoryAwareSynapses", "TypeError: parameter 'gain' must not be sharded over processes while importances"),
        ("packed", "TypeError: parameter 'gain' must not be sharded over processes with importance_format"),
        ("pending", "TypeError: parameter 'weight' must be placed by Shard or Replicate, got (Partial(sum),)"),
        ("grown", "RuntimeError: parameter 'weight' is sharded over processes and cannot grow"),
        ("gradient", "TypeError: the gradient of 'gain' must be placed by (Shard(dim=0),) as it is"),
        ("not finite", "RuntimeError: the path integral of 'gain' is not finite"),
        ("Fisher information", "RuntimeError: the score of 'gain' is not finite"),
    ],
)
def test_every_process_hears_of_errors(found, what, message):
    assert found["refusals"][what].startswith(message)


def test_one_path_integral_in_one_process_will_do(found):
    assert found["refusals"]["one path integral"] == ""


def test_nothing_has_changed_after_an_error(found):
    assert found["refusals"]["unchanged"] is True
    assert found["refusals"]["no gradient changed"] is True


def test_the_package_does_not_import_the_types_of_sharded_tensors():
    code = "import sys, limpet; sys.exit('torch.distributed.tensor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
