"""The path integral of Synaptic Intelligence against its reference in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from limpet import ops, reference
from op_cases import RESNET18_SHAPES
from tolerances import assert_close

SHAPES = [(), (1,), (0,), (3, 5), (7, 0, 2), (16384,), (16385,), (40000,), (64, 3, 3, 3)]
NARROW = (torch.float32, torch.bfloat16, torch.float16)
STORED = [(torch.float64,) * 3, *itertools.product(NARROW, repeat=3)]


def step_inputs(shapes, theta=torch.float32, anchor=None, importance=None):
    """One step over parameters of these shapes: a third of the elements does not move, with a gradient that is NaN."""
    previous = [torch.randn(shape).to(theta) for shape in shapes]
    still = [torch.rand(shape) < 1 / 3 for shape in shapes]
    params = [
        torch.where(s, p, (p + 0.1 * torch.randn(p.shape)).to(theta)) for p, s in zip(previous, still, strict=True)
    ]
    return {
        "integrals": [torch.randn(shape, dtype=reference.wide(theta)) for shape in shapes],
        "previous": previous,
        "params": params,
        "grads": [
            torch.randn(p.shape).to(theta).masked_fill(p == q, torch.nan) for p, q in zip(params, previous, strict=True)
        ],
        "anchors": [(p + 0.3 * torch.randn(p.shape)).to(anchor or theta) for p in previous],
        "importances": [torch.rand(shape).to(importance or theta) for shape in shapes],
    }


def without_penalty(step):
    return {**step, "anchors": (), "importances": ()}


def expected(step, strength):
    """The integrals in float64 after the step."""
    wide = {name: [t.to(torch.float64, copy=True) for t in tensors] for name, tensors in step.items()}
    reference.path_integral_update_(**wide, strength=strength)
    return wide["integrals"]


def public(*arguments):
    *lists, anchors, importances, strength = arguments
    ops.path_integral_update_(*lists, anchors=anchors, importances=importances, strength=strength)


def check(step, strength=3.0, update=public):
    """``update`` takes the op's arguments in their order; nothing but integrals and previous may change."""
    want = expected(step, strength)
    unchanged = {name: [t.clone() for t in step[name]] for name in ("params", "grads", "anchors", "importances")}
    update(*step.values(), strength)
    for got, wanted, before, param in zip(step["integrals"], want, step["previous"], step["params"], strict=True):
        assert_close(got, wanted)
        assert torch.equal(before, param)
    for name, tensors in unchanged.items():
        for got, was in zip(step[name], tensors, strict=True):
            torch.testing.assert_close(got, was, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtypes", STORED, ids=lambda d: "-".join(str(dtype)[6:] for dtype in d))
def test_matches_float64(dtypes):
    check(step_inputs(SHAPES, *dtypes))
    check(without_penalty(step_inputs(SHAPES, *dtypes)))


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=5),
    strength=st.just(0.0) | st.floats(1e-6, 1e6),
    penalty=st.booleans(),
)
@settings(max_examples=40)
def test_any_list_of_shapes(shapes, strength, penalty):
    step = step_inputs(shapes)
    check(step if penalty else without_penalty(step), strength)


def test_dtypes_side_by_side():
    steps = [step_inputs([(30,), (17, 3)], *dtypes) for dtypes in STORED]
    check({name: [t for step in steps for t in step[name]] for name in steps[0]})


def channels_last(tensor):
    return tensor.to(memory_format=torch.channels_last)


def spread(tensor):  # [*, n] -> the same values, every second element of a longer row
    return torch.stack([tensor, torch.full_like(tensor, torch.nan)], dim=-1).flatten(-2)[..., ::2]


def across(tensor):  # [..., m, n] -> the same values, columns in one piece
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize(
    "lists", [["params"], ["integrals"], ["previous", "grads"], ["anchors"], ["importances", "params"]]
)
@pytest.mark.parametrize("lay", [channels_last, spread, across], ids=lambda lay: lay.__name__)
def test_layouts(lay, lists):
    step = step_inputs([(4, 3, 5, 6), (2, 7, 3, 3)])
    for name in lists:
        step[name] = [lay(t) for t in step[name]]
    check(step)


@pytest.mark.parametrize("lay", [channels_last, spread, across], ids=lambda lay: lay.__name__)
def test_one_layout_for_all(lay):
    check({name: [lay(t) for t in tensors] for name, tensors in step_inputs([(4, 3, 5, 6)]).items()})


def test_a_skipped_step_leaves_no_trace():
    """A gradient scaler that finds overflow skips the step and leaves gradients that are not finite."""
    integral, theta = torch.randn(100), torch.randn(100)
    before, grad = integral.clone(), torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0]).repeat(25)
    ops.path_integral_update_([integral], [theta.clone()], [theta], [grad])
    assert torch.equal(integral, before)


def test_threads_and_repetitions_do_not_change_a_bit():
    results = []
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        step = step_inputs([(100_003,), (5,), (77_777,)])
        ops.path_integral_update_(**step, strength=5.0)
        results.append(step["integrals"])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_parameters_that_require_grad():
    step = step_inputs([(3, 2)])
    step["params"] = [p.requires_grad_() for p in step["params"]]
    ops.path_integral_update_(**step, strength=2.0)
    assert not any(t.requires_grad for t in (*step["integrals"], *step["previous"]))


def test_opcheck():
    step = step_inputs([(3, 2), (70,)])
    step["grads"] = [g.nan_to_num() for g in step["grads"]]
    torch.library.opcheck(torch.ops.limpet.path_integral_update_.default, (*step.values(), 3.0))
    step = without_penalty(step)
    torch.library.opcheck(torch.ops.limpet.path_integral_update_.default, (*map(list, step.values()), 0.0))


def test_compiles_whole():
    step = step_inputs([(3, 2), (70,)])
    want = expected(step, 3.0)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(step):
        ops.path_integral_update_(**step, strength=3.0)

    compiled(step)
    for got, wanted, before, param in zip(step["integrals"], want, step["previous"], step["params"], strict=True):
        assert_close(got, wanted)
        assert torch.equal(before, param)


def test_allocates_nothing():
    step = step_inputs(RESNET18_SHAPES)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.path_integral_update_(**step, strength=1.0)
    assert sum(e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0) == 0


def test_empty_lists():
    ops.path_integral_update_([], [], [], [])


def test_tensors_without_memory():
    """Shapes are all that a fake or meta tensor has; none shares memory with another."""
    step = {name: [t.to("meta") for t in tensors] for name, tensors in step_inputs([(3, 2), (70,)]).items()}
    ops.path_integral_update_(**step, strength=2.0)
    with FakeTensorMode():
        ops.path_integral_update_(*[[torch.empty(3, 2)] for _ in range(4)])


THETA = torch.ones(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": THETA}, TypeError, "params must be a list or tuple"),
        ({"grads": [None]}, TypeError, r"grads\[0\] must be a torch.Tensor, got NoneType"),
        ({"grads": []}, ValueError, r"grads must have as many tensors as params \(1\), got 0"),
        ({"grads": [torch.ones(3).to_sparse()]}, TypeError, r"grads\[0\] must be a dense tensor"),
        ({"grads": [torch.ones(3).half()]}, TypeError, r"grads\[0\] must be torch.float32 for params\[0\]"),
        ({"previous": [torch.ones(4)]}, ValueError, r"previous\[0\] must be of shape \[3\].*shape \[4\]"),
        ({"previous": [torch.ones(3, device="meta")]}, ValueError, r"previous\[0\] must be of shape \[3\] on cpu"),
        (
            {"previous": [THETA]},
            ValueError,
            r"previous\[0\] must have memory of its own, got that of a tensor in params",
        ),
        ({"integrals": [torch.zeros(3).half()]}, TypeError, r"integrals\[0\] must be torch.float32"),
        (
            {"integrals": [THETA]},
            ValueError,
            r"integrals\[0\] must have memory of its own, got that of a tensor in params",
        ),
        ({"anchors": [torch.zeros(3)]}, ValueError, r"importances must have as many tensors as params \(1\), got 0"),
        ({"importances": [torch.zeros(3)]}, ValueError, r"anchors must have as many tensors as params \(1\), got 0"),
        (
            {"anchors": [torch.zeros(3).double()], "importances": [torch.zeros(3)]},
            TypeError,
            r"anchors\[0\] must be torch.bfloat16 or torch.float16 or torch.float32",
        ),
        ({"strength": float("inf")}, ValueError, "strength must be finite, got inf"),
        ({"strength": "1"}, TypeError, "strength must be a number, got str '1'"),
    ],
)
def test_bad_input_changes_nothing(change, error, message):
    good = {"integrals": [torch.zeros(3)], "previous": [torch.zeros(3)], "params": [THETA], "grads": [torch.ones(3)]}
    with pytest.raises(error, match=message):
        ops.path_integral_update_(**{**good, **change})
    assert torch.equal(good["integrals"][0], torch.zeros(3))
    assert torch.equal(good["previous"][0], torch.zeros(3))
    assert torch.equal(THETA, torch.ones(3))


def test_a_tensor_that_is_written_twice_is_refused():
    one, theta, other = torch.zeros(2), torch.ones(2), torch.ones(2)
    with pytest.raises(
        ValueError, match=r"previous\[1\] must have memory of its own, got that of a tensor in previous"
    ):
        ops.path_integral_update_(
            [torch.zeros(2), torch.zeros(2)], [one, one], [theta, other], [torch.ones(2), torch.ones(2)]
        )
    assert torch.equal(one, torch.zeros(2))
