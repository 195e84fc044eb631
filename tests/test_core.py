"""The compiled module as a whole: instruction sets, OpenMP, what importing costs."""

import os
import subprocess
import sys

import pytest

from limpet import _core

EVERY_OP = """
import itertools, os, sys
import torch
sys.path.insert(0, os.environ["TESTS"])
import test_fisher_ops, test_gated_lateral, test_path_integral, test_quadratic
from op_cases import CHANNELS, CONV, DTYPES, LINEAR
from limpet import _core
assert _core.build_info()["instruction_set"] == os.environ["LIMPET_CPU"]
torch.manual_seed(0)
for dtype in DTYPES:
    for shape in LINEAR:
        test_fisher_ops.test_linear(shape, dtype)
    for case in CONV:
        test_fisher_ops.test_conv(case, dtype)
    for shape, channel_dim in CHANNELS:
        test_fisher_ops.test_bias_and_scale(shape, channel_dim, dtype)
    test_fisher_ops.test_embedding(dtype, 2)
torch.manual_seed(0)  # what a family is given does not depend on the cases of those before it
for dtypes in [(torch.float64,) * 3, *itertools.product(test_quadratic.NARROW, repeat=3)]:
    test_quadratic.test_value_and_gradient_match_float64(dtypes)
for dtypes in test_path_integral.STORED:
    test_path_integral.test_matches_float64(dtypes)
torch.manual_seed(0)
for dtype in DTYPES:
    for shape, channel_dim in test_gated_lateral.SHAPES:
        test_gated_lateral.check(*test_gated_lateral.inputs(shape, channel_dim, dtype), channel_dim)
for dtype in (torch.float32, torch.float64):
    test_gated_lateral.test_the_gate_keeps_its_relative_precision(dtype)
for width in (1, 40):
    test_gated_lateral.test_infinite_and_undefined_logits(width)
print("every op agrees")
"""


def run(code, **environment):
    environment = {**os.environ, "TESTS": os.path.dirname(__file__), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


def test_the_best_instruction_set_was_chosen():
    info = _core.build_info()
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][0] == "baseline"


@pytest.mark.parametrize("level", _core.build_info()["instruction_sets"])
def test_each_instruction_set(level):
    done = run(EVERY_OP, LIMPET_CPU=level)
    if "this processor does not have it" in done.stderr:
        pytest.skip(f"this processor does not have {level}")
    assert done.stdout.endswith("every op agrees\n"), done.stderr


def test_unknown_instruction_set_is_an_error():
    done = run("import limpet", LIMPET_CPU="mmx")
    assert done.returncode != 0
    assert "LIMPET_CPU must be one of baseline" in done.stderr
    assert "got mmx" in done.stderr


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_one_openmp_runtime():
    done = run(
        "import torch, limpet\n"
        "x = torch.randn(300, 300); x @ x; limpet.ops.sum_grad_squared_linear(x, x)\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rsplit('/', 1)[-1]})"
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 1, f"OpenMP runtimes in the process: {done.stdout}"


def test_import_brings_nothing_that_only_some_need():
    """The costly modules stay out of ``import limpet`` (the milliseconds are measured by the benches)."""
    done = run(
        "import sys, torch; before = set(sys.modules); import limpet\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; print(*sorted(new - {'limpet'}))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
