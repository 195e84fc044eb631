"""The accuracy matrix against the published formulas, written out."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limpet.metrics import AccuracyMatrix

R = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.7, 0.5, 1.0]]
B = [0.1, 0.15, 0.2]


def filled(rows, baseline=None):
    matrix = AccuracyMatrix(len(rows), baseline=baseline)
    for row in rows:
        matrix.record(row)
    return matrix


def test_the_formulas_by_hand():
    matrix = filled(R, B)
    assert matrix.average_accuracy() == pytest.approx((0.7 + 0.5 + 1.0) / 3)
    assert matrix.bwt() == pytest.approx(((0.7 - 0.9) + (0.5 - 0.8)) / 2)
    assert matrix.fwt() == pytest.approx(((0.2 - 0.15) + (0.3 - 0.2)) / 2)
    assert matrix.forgetting() == pytest.approx(((0.9 - 0.7) + (0.8 - 0.5)) / 2)


def test_over_all_tasks_as_in_the_public_code_of_gem():
    matrix = filled(R, B)
    assert matrix.bwt(over_tasks=True) == pytest.approx(matrix.bwt() * 2 / 3)
    assert matrix.fwt(over_tasks=True) == pytest.approx(matrix.fwt() * 2 / 3)


@given(
    st.integers(2, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_any_matrix(rows):
    matrix, tasks = filled(rows, [0.5] * len(rows)), len(rows)
    last = tasks - 1
    bwt = sum(rows[last][i] - rows[i][i] for i in range(last)) / last
    fwt = sum(rows[i - 1][i] - 0.5 for i in range(1, tasks)) / last
    forgetting = sum(max(rows[k][i] for k in range(last)) - rows[last][i] for i in range(last)) / last
    assert matrix.average_accuracy() == pytest.approx(sum(rows[last]) / tasks)
    assert matrix.bwt() == pytest.approx(bwt, abs=1e-12)
    assert matrix.fwt() == pytest.approx(fwt, abs=1e-12)
    assert matrix.forgetting() == pytest.approx(forgetting, abs=1e-12)


def test_numbers_are_over_the_tasks_learned_so_far():
    matrix = AccuracyMatrix(3)
    matrix.record(R[0])
    assert matrix.average_accuracy() == pytest.approx(0.9)
    assert math.isnan(matrix.bwt())
    assert math.isnan(matrix.forgetting())
    matrix.record(R[1])
    assert matrix.bwt() == pytest.approx(-0.3)


def test_what_was_not_evaluated_is_not_skipped():
    matrix = filled([[0.9], [math.nan, 0.8]])
    assert math.isnan(matrix.values[0, 1])
    assert math.isnan(matrix.average_accuracy())
    assert math.isnan(matrix.bwt())


def test_state_dict_round_trip():
    matrix, other = filled(R, B), AccuracyMatrix(1)
    other.load_state_dict(matrix.state_dict())
    assert torch.equal(other.values, matrix.values)
    assert other.fwt() == matrix.fwt()
    with pytest.raises(RuntimeError, match="all 3 rows have been recorded"):
        other.record(R[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: AccuracyMatrix(0), ValueError, "num_tasks must be at least 1, got 0"),
        (lambda: AccuracyMatrix(2.0), TypeError, "num_tasks must be an integer, got float 2.0"),
        (lambda: AccuracyMatrix(2, baseline=[0.1]), ValueError, "baseline must have 2 values"),
        (lambda: AccuracyMatrix(2).record([0.1, 1.5]), ValueError, r"accuracies must lie in \[0, 1\], got 1.5"),
        (lambda: AccuracyMatrix(2).record([0.1] * 3), ValueError, "at most 2 values"),
        (lambda: AccuracyMatrix(2).record("ab"), TypeError, "accuracies must be a sequence of numbers"),
        (lambda: AccuracyMatrix(2).bwt(), RuntimeError, "no row has been recorded"),
        (lambda: filled(R).fwt(), RuntimeError, "fwt needs the accuracy before any training"),
        (lambda: AccuracyMatrix(2).load_state_dict({}), ValueError, "state lacks baseline, num_learned, values"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_partial_rows():
    matrix = filled([[0.9, math.nan, math.nan], [0.7, 0.8, math.nan], [0.5, 0.8, 1.0]])
    assert matrix.bwt() == pytest.approx(-0.2)
    assert matrix.forgetting() == pytest.approx(0.2)  # the first task's rows, and the second's only one
    short = AccuracyMatrix(3)
    short.record([0.9])
    assert short.values[0].isnan().tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(2, 3)}, "square"),
        ({"num_learned": 3}, "at most 2, got 3"),
        ({"values": torch.full((2, 2), 2.0)}, "got 2.0"),
        ({"baseline": [0.5]}, "2 values"),
    ],
)
def test_bad_state_changes_nothing(change, message):
    matrix = filled([[0.9, 0.5], [0.8, 1.0]])
    with pytest.raises(ValueError, match=message):
        matrix.load_state_dict({**matrix.state_dict(), **change})
    with pytest.raises(ValueError, match="lacks values"):
        matrix.load_state_dict({"num_learned": 0, "baseline": None})
    assert matrix.average_accuracy() == pytest.approx(0.9)
