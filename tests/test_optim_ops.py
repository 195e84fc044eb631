"""The optimizer ops against their float64 reference: every dtype, what is absent, what must not change."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import _core, ops, reference
from tolerances import assert_close, relative_error

SHAPES = [(), (1,), (0,), (3, 5), (7, 0, 2), (16384,), (16401,), (64, 3, 3, 3)]
NARROW = (torch.float32, torch.bfloat16, torch.float16)
ADAMW_STATE = ("exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")


def tensors(shapes, dtype=torch.float32, anchor=torch.float32, importance=torch.float32):
    """What a step with everything takes, in the middle of training."""
    wide = reference.wide(dtype)
    made = {
        "params": [torch.randn(s).to(dtype) for s in shapes],
        "grads": [torch.randn(s).to(dtype) for s in shapes],
        "exp_avgs": [torch.randn(s).to(dtype) for s in shapes],
        "exp_avg_sqs": [torch.rand(s).add(0.1).to(dtype) for s in shapes],
        "max_exp_avg_sqs": [torch.rand(s).add(0.1).to(dtype) for s in shapes],
        "steps": [torch.tensor(float(k)) for k in range(len(shapes))],
        "integrals": [torch.randn(s).to(wide) for s in shapes],
        "importances": [torch.rand(s).to(importance) for s in shapes],
    }
    made["anchors"] = [(p.double() + torch.randn(p.shape)).to(anchor) for p in made["params"]]
    return made


def wider(made):
    """The same values in float64; step counts stay what they are."""
    return {name: [t.clone() if name == "steps" else t.double() for t in ts] for name, ts in made.items()}


def adamw(made, op, **more):
    options = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "weight_decay": 0.1, "maximize": False, **more}
    options["lr"] = torch.as_tensor(options["lr"], dtype=torch.float64)
    if op is reference.adamw_step_:
        nothing = {"grad_scale": None, "found_inf": None}
        op(**made, **{**nothing, "strength": 3.0, **options})
    else:
        op(**made, **{"strength": 3.0, **options})


def sgd(made, op, **more):
    buffers = {"momentum_buffers": made["exp_avgs"]} if more.pop("buffers", True) else {"momentum_buffers": []}
    made = {name: ts for name, ts in made.items() if name not in (*ADAMW_STATE, "steps")}
    options = {"lr": 0.01, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, **more}
    options = {"nesterov": False, "first_step": False, "maximize": False, "strength": 3.0, **options}
    options["lr"] = torch.as_tensor(options["lr"], dtype=torch.float64)
    nothing = {"grad_scale": None, "found_inf": None} if op is reference.sgd_step_ else {}
    op(**made, **buffers, **{**nothing, **options})


STEPS = {
    "adamw": (adamw, ops.adamw_step_, reference.adamw_step_),
    "sgd": (sgd, ops.sgd_step_, reference.sgd_step_),
}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def assert_agrees(kind, made, without=(), **options):
    """One step of the op against the reference in float64; what is read only keeps its bits."""
    step, op, spec = STEPS[kind]
    for name in without:
        made[name] = []
    want = wider(made)
    read_only = {name: [t.clone() for t in made[name]] for name in ("grads", "anchors", "importances")}
    start = {name: [t.double() for t in ts] for name, ts in made.items()}
    step(made, op, **options)
    step(want, spec, **options)
    for name, before in read_only.items():
        assert all(torch.equal(a, b) for a, b in zip(made[name], before, strict=True)), name
    for name, got in made.items():
        if name == "integrals":  # by the step that was really taken: a narrow parameter's is rounded
            continue
        if got:  # all together: in a tensor of one element two large numbers may cancel
            assert_close(flat(got), flat(want[name]))
    want_integrals = []
    for k in range(len(made["integrals"])):
        scale = options.get("grad_scale")
        grad = start["grads"][k] / (1.0 if scale is None else scale.double())
        moved = made["params"][k].double() - start["params"][k]
        share = (grad if options.get("maximize") else -grad) * moved
        want_integrals.append(start["integrals"][k] + share)
    if want_integrals:
        assert_close(flat(made["integrals"]), flat(want_integrals))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float64,) * 3, *itertools.product(NARROW, NARROW, NARROW)], ids=lambda d: "-".join(map(str, d))
)
def test_a_step_with_everything(kind, dtypes):
    assert_agrees(kind, tensors(SHAPES, *dtypes))


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integrals", [True, False])
@pytest.mark.parametrize("penalty", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_with_and_without(kind, dtype, integrals, penalty, maximize):
    wide = reference.wide(dtype)
    without = [*([] if integrals else ["integrals"]), *([] if penalty else ["anchors", "importances"])]
    scale = torch.tensor(8.0)
    made = tensors(SHAPES, dtype, wide, wide)
    assert_agrees(kind, made, [*without, "max_exp_avg_sqs"], maximize=maximize, grad_scale=scale)


@pytest.mark.parametrize(
    "options",
    [
        {"buffers": False},
        {"nesterov": True},
        {"dampening": 0.3},
        {"dampening": 0.3, "first_step": True},
        {"nesterov": True, "first_step": True},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_momentum(options):
    made = tensors(SHAPES)
    if not options.get("buffers", True):
        made["exp_avgs"] = []
    assert_agrees("sgd", made, **options)


def test_the_first_step_reads_no_buffer():
    made = tensors([(5,), (40,)])
    for buffer in made["exp_avgs"]:
        buffer.fill_(float("nan"))
    assert_agrees("sgd", made, first_step=True)


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.51, 0.999])
def test_any_decay(beta1):
    assert_agrees("adamw", tensors(SHAPES), beta1=beta1)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5),
    strength=st.just(0.0) | st.floats(1e-3, 1e3),
    lr=st.floats(1e-4, 1.0),
    kind=st.sampled_from(sorted(STEPS)),
)
@settings(max_examples=40)
def test_any_list_of_shapes(shapes, strength, lr, kind):
    assert_agrees(kind, tensors([(50,), *shapes]), strength=strength, lr=lr)


@pytest.mark.parametrize("kind", STEPS)
def test_strided_and_channels_last_tensors(kind):
    made = tensors([(8, 6), (4, 6), (4, 3, 5, 5), (4, 3, 5, 5)])
    for name, ts in made.items():
        if name == "steps":
            continue
        ts[2] = ts[2].to(memory_format=torch.channels_last)  # all alike: read where they lie
        if name in ("params", "grads", "exp_avgs"):
            ts[0] = torch.zeros(6, 8).t().copy_(ts[0])
            ts[1] = torch.zeros(4, 12)[:, ::2].copy_(ts[1])
            ts[3] = ts[3].to(memory_format=torch.channels_last)
    assert_agrees(kind, made)


@pytest.mark.parametrize("kind", STEPS)
def test_threads_do_not_change_a_bit(kind):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        made = tensors([(100_003,), (5,), (77_777,)])
        STEPS[kind][0](made, STEPS[kind][1])
        results.append([t for name in ("params", "exp_avgs", "exp_avg_sqs", "integrals") for t in made[name]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_that_a_scaler_skips_changes_nothing(kind):
    made = tensors(SHAPES)
    for grad in made["grads"]:
        grad.fill_(float("inf"))
    before = {name: [t.clone() for t in ts] for name, ts in made.items()}
    STEPS[kind][0](made, STEPS[kind][1], grad_scale=torch.tensor(2.0), found_inf=torch.tensor(1.0))
    for name, ts in made.items():
        assert all(torch.equal(a, b) for a, b in zip(ts, before[name], strict=True)), name
    made["grads"] = [torch.randn_like(p) for p in made["params"]]
    assert_agrees(kind, made, grad_scale=torch.tensor(2.0), found_inf=torch.tensor(0.0))


def test_what_does_not_move_adds_nothing():
    made = tensors([(40,)])
    made["grads"][0][:] = float("inf")  # and a learning rate of zero
    made["params"][0][:] = 0.0
    before = made["integrals"][0].clone()
    made["exp_avgs"][0][:] = made["anchors"][0][:] = 0.0
    ops.adamw_step_(
        made["params"],
        [torch.full((40,), 2.0)],
        made["exp_avgs"],
        made["exp_avg_sqs"],
        made["steps"],
        lr=0.0,
        integrals=made["integrals"],
    )
    assert torch.equal(made["integrals"][0], before)
    params = [torch.zeros(40)]
    ops.sgd_step_(params, [torch.zeros(40)], lr=1.0, integrals=made["integrals"])
    assert torch.equal(made["integrals"][0], before)


def test_an_integral_sums_what_narrow_parameters_really_moved():
    """bfloat16 parameters that are too large for a step to move them add nothing."""
    params, integral = [torch.full((70,), 256.0, dtype=torch.bfloat16)], [torch.zeros(70)]
    ops.sgd_step_(params, [torch.ones(70, dtype=torch.bfloat16)], lr=0.1, integrals=integral)
    assert relative_error(integral[0], torch.zeros(70)) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "grads must have as many tensors as params"),
        ({"grads": [torch.zeros(3)]}, ValueError, r"grads\[0\] must be of shape \[2\]"),
        ({"grads": [torch.zeros(2, dtype=torch.float64)]}, TypeError, r"grads\[0\] must be torch.float32"),
        ({"exp_avgs": [torch.zeros(2).half()]}, TypeError, r"exp_avgs\[0\] must be torch.float32"),
        ({"integrals": [torch.zeros(2).half()]}, TypeError, r"integrals\[0\] must be torch.float32"),
        ({"anchors": [torch.zeros(2)]}, ValueError, "importances must have as many"),
        ({"importances": [torch.zeros(2)]}, ValueError, "anchors must have as many"),
        ({"steps": [torch.zeros(2)]}, ValueError, r"steps\[0\] must be one float32"),
        ({"steps": []}, ValueError, "steps must have as many"),
        ({"params": torch.zeros(2)}, TypeError, "params must be a list"),
        ({"lr": "fast"}, TypeError, "lr must be a number"),
        ({"lr": torch.zeros(2)}, ValueError, "lr must be a number or a tensor of one element"),
        ({"strength": float("nan")}, ValueError, "strength must be finite"),
        ({"eps": None}, TypeError, "eps must be a number"),
        ({"found_inf": 1.0}, TypeError, "found_inf must be a torch.Tensor"),
    ],
    ids=str,
)
def test_bad_input_changes_nothing(change, error, message):
    zeros = {name: [torch.zeros(2)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    arguments = {**zeros, "steps": [torch.zeros(())], "lr": 0.1, **change}
    with pytest.raises(error, match=message):
        ops.adamw_step_(**arguments)
    assert zeros["params"][0].eq(0).all()


def test_opcheck():
    made = tensors([(3, 2), (70,)])
    for step, name in ((adamw, "adamw_step_"), (sgd, "sgd_step_")):
        op = getattr(torch.ops.limpet, name).default

        def check(op=op, **arguments):
            torch.library.opcheck(op, (), {"grad_scale": None, "found_inf": None, **arguments})

        step(made, check)


EVERY_DTYPE = """
import os, sys
import torch
sys.path.insert(0, os.environ["TESTS"])
import test_optim_ops as tests
from limpet import _core
assert _core.build_info()["instruction_set"] == os.environ["LIMPET_CPU"]
torch.manual_seed(0)
for kind in tests.STEPS:
    for dtype in (torch.float64, *tests.NARROW):
        wide = tests.reference.wide(dtype)
        tests.assert_agrees(kind, tests.tensors(tests.SHAPES, dtype, wide, wide))
print("every dtype agrees")
"""


@pytest.mark.parametrize("level", _core.build_info()["instruction_sets"])
def test_each_instruction_set(level):
    environment = {**os.environ, "TESTS": os.path.dirname(__file__), "LIMPET_CPU": level}
    run = [sys.executable, "-c", EVERY_DTYPE]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    if "this processor does not have it" in done.stderr:
        pytest.skip(f"this processor does not have {level}")
    assert done.stdout == "every dtype agrees\n", done.stderr
