"""The way of plain CPU tensors straight into the core: the same as torch's own functions, whatever comes in."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from limpet import ClassBalancedReservoir, Replay, ReservoirBuffer, RingBuffer, WeightedReservoir, _core

STRUCTURES = {
    "tensor": lambda x, y: x,
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y, x[:, :0]],
    "dict": lambda x, y: {"x": (x, x > 0), "y": y},
}


def batch_of(structure, first, count):
    number = torch.arange(first, first + count)
    return STRUCTURES[structure](number.view(-1, 1).expand(-1, 5).float().contiguous(), number)


def equal(one, other):
    ours, spec = torch.utils._pytree.tree_flatten(one)
    others, expected = torch.utils._pytree.tree_flatten(other)
    return spec == expected and all(map(torch.equal, ours, others)) and all(t.is_contiguous() for t in ours)


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedReservoir, WeightedReservoir, RingBuffer])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_same_with_and_without_it(kind, structure, monkeypatch):
    """Without it torch is as before 2.10."""

    def results():
        buffer, results = kind(9, seed=3), []
        for count in (0, 4, 30, 1):
            batch = batch_of(structure, buffer.seen, count)
            if kind is ClassBalancedReservoir:
                buffer.add(batch, group=torch.arange(count) % 3)
            else:
                buffer.add(batch)
            results += [buffer.sample_into(batch, 0.5), buffer.sample(len(buffer) // 2)]
        return buffer, results

    plain, ours = results()
    assert isinstance(plain._plain, _core.PlainRows)
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__")
    other, expected = results()
    assert other._plain is None
    assert all(map(equal, ours, expected))
    assert all(map(equal, plain, other))
    assert torch.equal(plain.items, other.items)


@settings(max_examples=30, deadline=None)
@given(new=st.integers(0, 40), threads=st.integers(1, 3), width=st.integers(0, 3000), fraction=st.floats(0, 0.9))
def test_mixed_rows_do_not_depend_on_threads(new, threads, width, fraction):
    x = torch.randn(50, width)
    buffer = ReservoirBuffer(50)
    buffer.add(x)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        mixed = buffer.sample_into(x[:new], fraction)
    finally:
        torch.set_num_threads(before)
    replayed = min(50, round(new * fraction / (1 - fraction)))
    index = torch.ops.limpet.sample_without_replacement_
    places = torch.empty(replayed, dtype=torch.int64)
    if replayed:
        index(places, 50, 0, 0)
    assert torch.equal(mixed, torch.cat([x[:new], x[places]]))


def test_what_is_not_plain_is_the_same():
    x = torch.randn(6, 4)
    expected = ReservoirBuffer(4)
    expected.add(x)
    ways = [
        x.repeat_interleave(2, dim=1)[:, ::2],
        nn.Parameter(x.clone()),
        x.clone().requires_grad_(),
        x.t().contiguous().t(),
        x.repeat(2, 1)[6:],
        x.expand(1, 6, 4)[0],
    ]
    for way in ways:
        buffer = ReservoirBuffer(4)
        buffer.add(x[:1])
        buffer.add(way[1:])
        assert torch.equal(torch.stack(list(buffer)), torch.stack(list(expected)))
        assert not buffer.sample(2).requires_grad
        mixed = buffer.sample_into(way, 0.25)
        assert torch.equal(mixed[:6], x)
        assert mixed.requires_grad == way.requires_grad


def test_gradients_reach_what_is_mixed():
    buffer, x = ReservoirBuffer(4), torch.randn(6, 4, requires_grad=True)
    buffer.add(x)
    buffer.sample_into(x, 0.25).sum().backward()
    assert torch.equal(x.grad, torch.ones(6, 4))


@pytest.mark.parametrize("kind", [ReservoirBuffer, ClassBalancedReservoir, WeightedReservoir, RingBuffer])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
@pytest.mark.parametrize(
    "view",
    [
        lambda z: z.conj(),
        lambda z: z.conj().imag,
        lambda z: z[:1, :1].conj().imag,
        lambda z: z.conj().imag.as_strided((5, 3), (3, 1)),
    ],
    ids=["conjugated", "negated", "one number", "without gaps"],
)
def test_views_whose_memory_holds_other_signs(kind, dtype, view):
    rows = view(torch.randn(8, 3, dtype=dtype))
    assert rows.is_conj() or rows.is_neg()
    values, label = rows.clone(), {"group": 0} if kind is ClassBalancedReservoir else {}
    buffer = kind(20)
    for batch in (values, rows):
        buffer.add(batch, **label)
    assert torch.equal(torch.stack(list(buffer)), torch.cat([values, values]))
    assert torch.equal(buffer.sample_into(rows, 0.5)[: len(rows)], values)


def test_weights_that_are_a_negated_view():
    weight = torch.complex(torch.ones(1, dtype=torch.float64), torch.full((1,), -2.0, dtype=torch.float64)).conj().imag
    assert weight.is_neg()
    one, other = WeightedReservoir(2), WeightedReservoir(2)
    one.add(torch.zeros(1), weight=weight)
    other.add(torch.zeros(1), weight=2.0)
    assert torch.equal(one._keys, other._keys)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.bfloat16, torch.float8_e5m2])
def test_dtypes(dtype):
    x = torch.randint(2, (30, 3)).to(dtype)
    buffer = ReservoirBuffer(20)
    buffer.add(x[:9])
    buffer.add(x[9:20])
    mixed = buffer.sample_into(x[:8], 0.5)
    assert mixed.dtype == dtype
    assert torch.equal(mixed[:8].view(torch.uint8), x[:8].view(torch.uint8))


def test_rows_that_moved_into_shared_memory():
    buffer, x = ReservoirBuffer(40), torch.arange(40.0).view(20, 2)
    buffer.add(x[:10])
    for field in buffer._fields:  # as sending the buffer to another process does
        field.share_memory_()
    buffer.add(x[10:])
    assert torch.equal(torch.stack(list(buffer)), x)
    assert set(buffer.sample(20)[:, 0].tolist()) == set(x[:, 0].tolist())


def test_a_copy_has_rows_of_its_own():
    buffer = RingBuffer(4)
    buffer.add(torch.zeros(4))
    other = copy.deepcopy(buffer)
    other.add(torch.ones(400))
    assert buffer.sample_into(torch.zeros(1), 0.8).eq(0).all()
    assert other.sample_into(torch.ones(1), 0.8).eq(1).all()


def test_a_compiled_loop():
    replay = Replay(20, fraction=0.5)
    x, y = torch.randn(12, 3), torch.arange(12)
    replay.observe(x, y)

    @torch.compile(backend="eager")
    def step(x, y):
        mixed, labels = replay.mix(x, y)
        replay.observe(x, y)
        return mixed * 2, labels

    mixed, labels = step(x, y)
    assert torch.equal(mixed, 2 * x[labels])
    assert replay.buffer.seen == 24


def test_rows_of_the_core_refuse_what_was_not_counted():
    rows = _core.PlainRows(torch.Tensor.__dlpack_c_exchange_api__, torch.Tensor, tuple, [torch.zeros(4, 2)])
    assert rows.count((torch.zeros(3, 2),)) == 3
    wrong = [torch.zeros(3, 2), (torch.zeros(3),), (torch.zeros(3, 2, device="meta"),), (torch.zeros(3, 2),) * 2, None]
    assert [rows.count(batch) for batch in wrong] == [-1] * len(wrong)
    assert rows.mixed(wrong[0], 0.5, 4, 0, 0, 1) is None
    with pytest.raises(ValueError, match="must be one that was counted"):
        rows.gathered((torch.zeros(3, 3),), torch.zeros(2, dtype=torch.int64), 1)
