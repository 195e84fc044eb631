"""The Fisher family's ops against their float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from limpet import ops, reference
from op_cases import CHANNELS, CONV, DTYPES, LINEAR
from tolerances import assert_close


def spatial(value, dims):
    return [value] * dims if isinstance(value, int) else list(value)


def conv_reference(d, x, case):
    dims = len(case.size)
    g = case.geometry
    arguments = [spatial(g.get(k, v), dims) for k, v in (("stride", 1), ("padding", 0), ("dilation", 1))]
    return reference.sum_grad_squared_conv(d.double(), x.double(), case.kernel, *arguments, g.get("groups", 1))


def channels(value, channel_dim):  # -> [N, A, C, B]
    n, *rest = value.shape
    return value.reshape(n, -1, rest[-1], 1) if channel_dim == -1 else value.reshape(n, 1, rest[0], -1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape, dtype):
    samples, places, rows, columns = shape
    d, a = torch.randn(samples, places, rows).to(dtype), torch.randn(samples, places, columns).to(dtype)
    want = reference.sum_grad_squared_linear(d.double(), a.double())
    got = ops.sum_grad_squared_linear(d, a)
    assert got.dtype == reference.wide(dtype)
    assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_strided(dtype):
    d = torch.randn(9, 4, 13).to(dtype).transpose(0, 1)  # time-major
    a = torch.randn(4, 9, 140).to(dtype)[..., ::2]
    want = reference.sum_grad_squared_linear(d.double(), a.double())
    assert_close(ops.sum_grad_squared_linear(d, a), want)
    assert_close(ops.sum_grad_squared_linear(d.reshape(4, 3, 3, 13), a.reshape(4, 3, 3, 70)), want)
    places_last = torch.randn(4, 70, 40).to(dtype).mT, torch.randn(4, 83, 40).to(dtype).mT
    assert_close(
        ops.sum_grad_squared_linear(*places_last), reference.sum_grad_squared_linear(*(t.double() for t in places_last))
    )
    one = torch.randn(13, 9).to(dtype).t()  # T = 1, [N, O] with strides (1, 9)
    assert_close(
        ops.sum_grad_squared_linear(one, a[:1, :, :].expand(1, 9, 70)[0]),
        reference.sum_grad_squared_linear(one.double()[:, None], a[:1].double()[0][:, None]),
    )


@given(
    shape=st.tuples(st.integers(0, 9), st.integers(0, 40), st.integers(0, 70), st.integers(0, 140)),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_linear_on_any_shape(shape, seed):
    torch.manual_seed(seed)
    samples, places, rows, columns = shape
    d, a = torch.randn(samples, places, rows), torch.randn(samples, places, columns)
    want = reference.sum_grad_squared_linear(d.double(), a.double())
    assert_close(ops.sum_grad_squared_linear(d, a), want, torch.float32)


def test_linear_is_the_sum_of_its_batches():
    d, a = torch.randn(50, 3, 20), torch.randn(50, 3, 90)
    total = torch.zeros(20, 90)
    for part in (slice(0, 13), slice(13, 14), slice(14, 50)):
        assert ops.sum_grad_squared_linear(d[part], a[part], into=total) is total
    assert_close(total, reference.sum_grad_squared_linear(d.double(), a.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CONV, ids=str)
def test_conv(case, dtype):
    d, x = case.make(dtype)
    got = ops.sum_grad_squared_conv(d, x, case.kernel, **case.geometry)
    assert got.dtype == reference.wide(dtype)
    assert_close(got, conv_reference(d, x, case))


@pytest.mark.parametrize("case", [c for c in CONV if len(c.size) == 2], ids=str)
def test_conv_channels_last_and_strided(case):
    d, x = case.make(torch.float32)
    want = conv_reference(d, x, case)
    last = [t.to(memory_format=torch.channels_last) for t in (d, x)]
    assert_close(ops.sum_grad_squared_conv(*last, case.kernel, **case.geometry), want)
    flipped = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (d, x)]
    assert_close(ops.sum_grad_squared_conv(*flipped, case.kernel, **case.geometry), want)


@given(data=st.data())
@settings(max_examples=60)
def test_conv_on_any_geometry(data):
    draw = data.draw
    groups = draw(st.integers(1, 3))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(3))
    padding = draw(st.tuples(*[st.integers(0, 2)] * 2))
    size = tuple((k - 1) * dl + 1 + draw(st.integers(0, 6)) for k, dl in zip(kernel, dilation, strict=True))
    x = torch.randn(draw(st.integers(1, 4)), groups * draw(st.integers(1, 3)), *size)
    weight = torch.randn(groups * draw(st.integers(1, 9)), x.shape[1] // groups, *kernel)
    output = torch.conv2d(x, weight, None, stride, padding, dilation, groups)
    d = torch.randn(output.shape)
    want = reference.sum_grad_squared_conv(d.double(), x.double(), kernel, stride, padding, dilation, groups)
    assert_close(ops.sum_grad_squared_conv(d, x, kernel, stride, padding, dilation, groups), want)


@given(data=st.data())
@settings(max_examples=40)
def test_conv_by_tiles(data):
    """Kernels of 3 x 3 with a step of one, two vectors of channels or more; outputs may end early."""
    draw = data.draw
    groups, samples = draw(st.integers(1, 2)), draw(st.integers(1, 5))
    padding = draw(st.tuples(*[st.integers(0, 3)] * 2))
    x = torch.randn(samples, groups * draw(st.integers(32, 50)), *draw(st.tuples(*[st.integers(3, 26)] * 2)))
    ends = [draw(st.integers(0, 1)) for _ in range(2)]  # places that the gradient lacks at the end
    size = (max(0, x.shape[2 + i] + 2 * padding[i] - 2 - ends[i]) for i in range(2))
    d = torch.randn(samples, groups * draw(st.integers(32, 70)), *size)
    if draw(st.booleans()):
        d, x = (t.contiguous(memory_format=torch.channels_last) for t in (d, x))
    elif draw(st.booleans()):
        d, x = (t.mT.contiguous().mT for t in (d, x))
    got = ops.sum_grad_squared_conv(d, x, 3, 1, padding, 1, groups)
    d = torch.nn.functional.pad(d, [0, ends[1], 0, ends[0]])
    want = reference.sum_grad_squared_conv(d.double(), x.double(), [3, 3], [1, 1], list(padding), [1, 1], groups)
    assert_close(got, want)


@given(data=st.data())
@settings(max_examples=40)
def test_conv_by_few_tiles(data):
    """Pictures of two to four tiles of 4 x 4 places, the last ones partly behind the end."""
    draw = data.draw
    down, across = draw(st.sampled_from([(1, 2), (2, 1), (1, 3), (3, 1), (2, 2), (1, 4), (4, 1)]))
    size = 4 * down - draw(st.integers(0, 1)), 4 * across - draw(st.integers(0, 1))
    groups, samples = draw(st.integers(1, 2)), draw(st.integers(1, 20))
    dtype, padding = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])), draw(st.integers(0, 2))
    d = torch.randn(samples, groups * draw(st.integers(32, 150)), *size).to(dtype)
    x = torch.randn(samples, groups * draw(st.integers(32, 60)), *(n + 2 - 2 * padding for n in size)).to(dtype)
    if draw(st.booleans()):
        d, x = (t.contiguous(memory_format=torch.channels_last) for t in (d, x))
    want = reference.sum_grad_squared_conv(d.double(), x.double(), [3, 3], [1, 1], [padding] * 2, [1, 1], groups)
    assert_close(ops.sum_grad_squared_conv(d, x, 3, 1, padding, 1, groups), want, reference.wide(dtype))


@pytest.mark.parametrize("size", [8, 18])
@pytest.mark.parametrize(("samples", "groups"), [(15, 1), (16, 1), (33, 1), (33, 2)])
def test_conv_by_tiles_of_many_samples(samples, groups, size):
    """From 16 samples on they are cut into parts, which threads share."""
    d, x = torch.randn(samples, groups * 40, size, size), torch.randn(samples, groups * 150, size, size)
    want = reference.sum_grad_squared_conv(d.double(), x.double(), [3, 3], [1, 1], [1, 1], [1, 1], groups)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(ops.sum_grad_squared_conv(d, x, 3, 1, 1, 1, groups))
    assert_close(results[0], want)
    assert all(torch.equal(results[0], other) for other in results[1:])


@given(data=st.data())
@settings(max_examples=40)
def test_conv_with_places_left_out(data):
    """Small pictures with much padding, channels for more than a register tile; outputs may end early."""
    draw = data.draw
    groups, samples = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    kernel, stride, dilation = (draw(st.tuples(*[st.integers(1, n)] * 2)) for n in (5, 3, 2))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 2))
    reach = [(k - 1) * dl + 1 - 2 * p for k, dl, p in zip(kernel, dilation, padding, strict=True)]
    size = (max(1, r) + draw(st.integers(0, 6)) for r in reach)
    x = torch.randn(samples, groups * draw(st.integers(6, 30)), *size)
    ends = [draw(st.integers(0, 1)) for _ in range(2)]  # places that the gradient lacks at the end
    outputs = ((x.shape[2 + i] - reach[i]) // stride[i] + 1 - ends[i] for i in range(2))
    d = torch.randn(samples, groups * draw(st.integers(1, 70)), *outputs)
    if draw(st.booleans()):
        d, x = (t.contiguous(memory_format=torch.channels_last) for t in (d, x))
    got = ops.sum_grad_squared_conv(d, x, kernel, stride, padding, dilation, groups)
    d = torch.nn.functional.pad(d, [0, ends[1], 0, ends[0]])
    want = reference.sum_grad_squared_conv(d.double(), x.double(), kernel, stride, padding, dilation, groups)
    assert_close(got, want)


@pytest.mark.parametrize("size", [4, 8, 18])
def test_conv_sums_as_single_samples_do(size):
    d, x = torch.randn(7, 40, size, size), torch.randn(7, 40, size, size)
    one_by_one = torch.zeros(40, 40, 3, 3)
    for n in range(7):
        ops.sum_grad_squared_conv(d[n : n + 1], x[n : n + 1], 3, 1, 1, into=one_by_one)
    assert_close(ops.sum_grad_squared_conv(d, x, 3, 1, 1), one_by_one)


@pytest.mark.parametrize(("size", "bound"), [(8, 3), (32, 1)])
def test_the_error_of_large_tiles_beside_that_of_a_direct_contraction(size, bound):
    """A permutation of the places' dimensions is a kernel of three dimensions, which goes the direct way."""
    d, x = torch.randn(4, 64, size, size), torch.randn(4, 64, size, size)
    want = reference.sum_grad_squared_conv(d.double(), x.double(), [3, 3], [1, 1], [1, 1], [1, 1], 1)
    direct = ops.sum_grad_squared_conv(d[:, :, :, None], x[:, :, :, None], (3, 1, 3), 1, (1, 0, 1)).squeeze(3)
    assert (ops.sum_grad_squared_conv(d, x, 3, 1, 1) - want).norm() < bound * (direct - want).norm()


def test_conv_empty():
    assert ops.sum_grad_squared_conv(torch.zeros(0, 2, 3), torch.zeros(0, 1, 4), 2).tolist() == [[[0, 0]], [[0, 0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), CHANNELS)
def test_bias_and_scale(shape, channel_dim, dtype):
    d, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    wide = [channels(t.double(), channel_dim) if t.numel() else torch.zeros(0, 1, shape[-1], 1) for t in (d, x)]
    bias, scale = reference.sum_grad_squared_bias(wide[0]), reference.sum_grad_squared_scale(*wide)
    assert_close(ops.sum_grad_squared_bias(d, channel_dim=channel_dim), bias, reference.wide(dtype))
    assert_close(ops.sum_grad_squared_scale(d, x, channel_dim=channel_dim), scale, reference.wide(dtype))
    if d.dim() == 4 and d.numel():
        last = [t.to(memory_format=torch.channels_last) for t in (d, x)]
        assert_close(ops.sum_grad_squared_scale(*last, channel_dim=channel_dim), scale, reference.wide(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "channel_dim"), CHANNELS)
def test_scale_with_a_shift(shape, channel_dim, dtype):
    d, x = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    shift = 3 + torch.randn(shape[channel_dim], dtype=reference.wide(dtype))
    wide = [channels(t.double(), channel_dim) if t.numel() else torch.zeros(0, 1, shape[-1], 1) for t in (d, x)]
    want = reference.sum_grad_squared_scale(*wide, shift.double())
    layouts = [(d, x), (d.mT.contiguous().mT, x)] if d.dim() > 2 else [(d, x)]
    if d.dim() == 4:
        layouts.append((d.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)))
    for tensors in layouts:
        got = ops.sum_grad_squared_scale(*tensors, channel_dim=channel_dim, shift=shift)
        assert_close(got, want, reference.wide(dtype))


@given(sizes=st.tuples(*[st.integers(0, 4)] * 2, st.integers(1, 70), st.integers(0, 70)), seed=st.integers(0, 99))
@settings(max_examples=60)
def test_bias_and_scale_in_any_order_of_memory(sizes, seed):
    torch.manual_seed(seed)
    c = sizes[2]
    order = torch.randperm(4).tolist()
    d, x = (torch.randn([sizes[i] for i in order]).permute(*torch.tensor(order).argsort().tolist()) for _ in range(2))
    shift = torch.randn(c)
    bias, scale = torch.ops.limpet.sum_grad_squared_bias_, torch.ops.limpet.sum_grad_squared_scale_
    for op, expected, tensors in (
        (bias, reference.sum_grad_squared_bias, (d,)),
        (scale, reference.sum_grad_squared_scale, (d, x)),
        (scale, reference.sum_grad_squared_scale, (d, x, shift)),
    ):
        total = torch.zeros(c)
        op(total, *tensors)
        assert_close(total, expected(*(t.double() for t in tensors)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding(dtype, padding_idx):
    d, indices = torch.randn(6, 9, 70).to(dtype), torch.randint(5, (6, 9))
    row = -1 if padding_idx is None else padding_idx
    want = reference.sum_grad_squared_embedding(d.double(), indices, 11, row)
    assert_close(ops.sum_grad_squared_embedding(d, indices, 11, padding_idx=padding_idx), want)
    flat = d.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(ops.sum_grad_squared_embedding(flat, indices.int(), 11, padding_idx=padding_idx), want)


def test_threads_do_not_change_a_bit():
    convolutions = [(case, *case.make(torch.float32)) for case in (CONV[i] for i in (1, 3, 5, 10, 18, 22, 27))]
    d, a = torch.randn(100, 16, 100), torch.randn(100, 16, 300)
    bd = torch.randn(20, 40, 333)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            [
                ops.sum_grad_squared_linear(d, a),
                ops.sum_grad_squared_linear(d[:, 0], a[:, 0]),
                *(ops.sum_grad_squared_conv(cd, cx, case.kernel, **case.geometry) for case, cd, cx in convolutions),
                ops.sum_grad_squared_bias(bd),
                ops.sum_grad_squared_scale(bd, bd, channel_dim=1, shift=bd[0, :, 0]),
                ops.sum_grad_squared_embedding(d, torch.arange(1600).reshape(100, 16) % 7, 9),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    library = torch.ops.limpet
    d, a = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    torch.library.opcheck(library.sum_grad_squared_linear_.default, (torch.zeros(5, 7), d, a))
    cd, cx = CONV[1].make(torch.float32)
    torch.library.opcheck(
        library.sum_grad_squared_conv_.default,
        (torch.zeros(6, 2, 3, 3), cd, cx, [3, 3], [2, 1], [1, 0], [1, 2], 2),
    )
    torch.library.opcheck(library.sum_grad_squared_bias_.default, (torch.zeros(5), d[..., None]))
    norm, rows = library.sum_grad_squared_norm_.default, torch.rand(d.shape[:2])
    torch.library.opcheck(norm, (torch.zeros(5), torch.zeros(5), d, d, rows, rows))
    for shift in ((), (torch.ones(5),)):
        torch.library.opcheck(
            library.sum_grad_squared_scale_.default, (torch.zeros(5), d[..., None], d[..., None], *shift)
        )
    torch.library.opcheck(
        library.sum_grad_squared_scale_.default, (torch.zeros(5), d[..., None], d[..., None], None, torch.zeros(5))
    )
    torch.library.opcheck(
        library.sum_grad_squared_embedding_.default, (torch.zeros(4, 5), d, torch.zeros(3, 2, dtype=torch.int64), -1)
    )


def test_compiles_whole():
    d, a = torch.randn(3, 2, 5), torch.randn(3, 2, 7)
    compiled = torch.compile(ops.sum_grad_squared_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(d, a), ops.sum_grad_squared_linear(d, a))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.sum_grad_squared_linear(None, torch.zeros(1, 1)), TypeError, "output_grad must be a torch.Tensor"),
        (lambda: ops.sum_grad_squared_linear(torch.zeros(2, 3), torch.zeros(3, 3)), ValueError, "leading dimensions"),
        (
            lambda: ops.sum_grad_squared_linear(torch.zeros(2, 3), torch.zeros(2, 3).double()),
            TypeError,
            "input must have output_grad's dtype torch.float32, got torch.float64",
        ),
        (
            lambda: ops.sum_grad_squared_linear(torch.zeros(2, 3), torch.zeros(2, 3), into=torch.zeros(3, 4)),
            ValueError,
            r"into must be a contiguous torch.float32 tensor of shape \[3, 3\]",
        ),
        (
            lambda: ops.sum_grad_squared_conv(torch.zeros(1, 1, 9), torch.zeros(1, 1, 9), 3),
            ValueError,
            "needs 11 padded input places in dimension 0, got 9 and padding 0",
        ),
        (
            lambda: ops.sum_grad_squared_conv(torch.zeros(1, 3, 2), torch.zeros(1, 4, 3), 2, groups=2),
            ValueError,
            "groups must divide the channels 3 and 4, got 2",
        ),
        (
            lambda: ops.sum_grad_squared_conv(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3), (2, 2)),
            ValueError,
            r"kernel_size must be one integer or 1, got \(2, 2\)",
        ),
        (lambda: ops.sum_grad_squared_bias(torch.zeros(2, 3, 4), channel_dim=7), ValueError, "must be 1 or -1, got 7"),
        (lambda: ops.sum_grad_squared_scale(torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, "output_grad's shape"),
        (
            lambda: ops.sum_grad_squared_scale(torch.zeros(2, 3), torch.zeros(2, 3), shift=torch.zeros(2)),
            ValueError,
            r"shift must be a torch.float32 tensor of shape \[3\], got a torch.float32 tensor of shape \[2\]",
        ),
        (
            lambda: ops.sum_grad_squared_scale(torch.zeros(2, 3), torch.zeros(2, 3), shift=torch.zeros(3).bfloat16()),
            ValueError,
            "shift must be a torch.float32 tensor",
        ),
        (
            lambda: ops.sum_grad_squared_embedding(torch.zeros(1, 2, 3), torch.tensor([[0, 9]]), 4),
            ValueError,
            "indices must be at least 0 and below 4, got 0 to 9",
        ),
        (
            lambda: ops.sum_grad_squared_embedding(torch.zeros(1, 2, 3), torch.zeros(1, 2), 4),
            TypeError,
            "indices must be an int64 or int32 tensor",
        ),
        (
            lambda: ops.sum_grad_squared_embedding(torch.zeros(1, 2, 3), torch.zeros(1, 2).int(), 4, padding_idx=4),
            ValueError,
            "padding_idx must be below num_embeddings 4, got 4",
        ),
        (
            lambda: ops.sum_grad_squared_embedding(torch.zeros(3), torch.tensor(0), 4),
            ValueError,
            "output_grad must have at least 2 dimensions",
        ),
        (
            lambda: ops.sum_grad_squared_conv(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3), 2.0),
            TypeError,
            "kernel_size must be one integer or a sequence of 1, got float 2.0",
        ),
        (
            lambda: ops.sum_grad_squared_bias(torch.zeros(2, 3).to_sparse()),
            TypeError,
            "output_grad must be a dense tensor, got a torch.sparse_coo torch.float32 tensor",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def conjugated(shape):
    """A tensor whose values lie in memory with the other sign."""
    return torch.randn(*shape, dtype=torch.complex64).conj().imag


def test_views_that_only_torch_knows():
    d, a = conjugated((4, 3, 5)), conjugated((4, 3, 7))
    assert d.is_neg()
    want = reference.sum_grad_squared_linear(d.resolve_neg().double(), a.resolve_neg().double())
    assert_close(ops.sum_grad_squared_linear(d, a), want)
    assert_close(ops.sum_grad_squared_linear(d.flip(0), a.flip(0)), want)
    one = d[:1, :1].expand(4, 3, 5)  # strides of 0
    assert_close(ops.sum_grad_squared_linear(one, a), ops.sum_grad_squared_linear(one.contiguous(), a))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value):
    d, a = torch.randn(4, 3, 5), torch.randn(4, 3, 7)
    d[2, 1, 3] = value
    for places in (slice(0, 3), slice(1, 2)):
        total = ops.sum_grad_squared_linear(d[:, places], a[:, places])
        assert not total[3].isfinite().any()
        assert total[:3].isfinite().all()
        assert total[4].isfinite().all()
