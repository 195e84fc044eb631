"""The Triton kernels in Triton's interpreter, on the CPU, against the reference in float64.

Whether a kernel is interpreted is decided when it is decorated, for the whole process. So this file runs
itself once more in a process of its own; only there, with TRITON_INTERPRET=1, are the tests below defined.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any
from unittest import mock

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

TRITON, NUMPY = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
if TRITON < (3, 9) and NUMPY >= (2, 4):  # the pair was tried with triton 3.6
    pytest.skip("the interpreter of this triton does not work with this numpy", allow_module_level=True)

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_kernels_in_the_interpreter() -> None:
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr

    def test_importing_limpet_does_not_import_triton() -> None:
        code = "import sys, limpet; sys.exit('triton' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code]).returncode == 0

else:
    import torch
    import triton.language as tl
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from torch import Tensor
    from triton.runtime import interpreter

    from limpet import reference
    from limpet.triton_kernels import (
        _contraction,
        _packing,
        _tiles,
        _tuning,
        fisher,
        fisher_channel,
        fisher_conv,
        fisher_embedding,
        gated_lateral,
        path_integral,
        reservoir,
    )
    from test_path_integral import check as check_path_integral
    from test_path_integral import step_inputs, without_penalty
    from tolerances import assert_close

    # The interpreter keeps bfloat16 as 16-bit integers, which its dot multiplies as integers. Widening loses nothing.
    _dot = interpreter.InterpreterBuilder.create_dot

    def _widened_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return _dot(self, *(self.cast_impl(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)), *args)

    interpreter.InterpreterBuilder.create_dot = _widened_dot

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    few = settings(max_examples=25, deadline=None, derandomize=True)
    sizes = st.integers(0, 3) | st.integers(4, 40)

    def values(*shape: int, dtype: torch.dtype, seed: int, strided: bool) -> Tensor:
        """Random values; strided ones are every second column of a tensor with its dimensions reversed."""
        generator = torch.Generator().manual_seed(seed)
        if not strided:
            return torch.randn(shape, generator=generator).to(dtype)
        reversed_shape = (*shape[:0:-1], 2 * shape[0])
        tensor = torch.randn(reversed_shape, generator=generator).to(dtype)
        return tensor[..., ::2].permute(*range(len(shape))[::-1])

    def check(launch: object, total_shape: tuple[int, ...], want: Tensor, *args: object) -> None:
        """``launch`` adds ``want`` to what is there; the result is float32 whatever the inputs are."""
        before = torch.rand(total_shape)
        total = before.clone()
        launch(total, *args)  # type: ignore[operator]
        assert_close(total, before.double() + want, torch.float32)

    @contextmanager
    def multiplying(dtype: torch.dtype, split: bool) -> Iterator[None]:
        """As on a GPU with tf32, where ``split``."""
        chosen = _tiles.MATRIX_UNITS if dtype != torch.float32 else _tiles.SPLIT_TF32
        patches = [mock.patch.object(module, "arithmetic", return_value=chosen) for module in (fisher, fisher_conv)]
        with ExitStack() as stack:
            for patch in patches if split else []:
                stack.enter_context(patch)
            yield

    @few
    @given(
        st.integers(0, 5),
        sizes,
        st.integers(1, 70),
        st.integers(1, 70),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.booleans(),
    )
    def test_linear(n: int, t: int, o: int, i: int, dtype: torch.dtype, strided: bool, split: bool) -> None:
        d = values(n, t, o, dtype=dtype, seed=0, strided=strided)
        a = values(n, t, i, dtype=dtype, seed=1, strided=strided)
        want = reference.sum_grad_squared_linear(d.double(), a.double())
        with multiplying(dtype, split):
            check(fisher.sum_grad_squared_linear_, (o, i), want, d, a)

    @few
    @given(
        st.integers(1, 3),
        st.sampled_from([(1, 3, 5), (2, 2, 3), (4, 1, 1), (1, 3, 16), (2, 5, 33)]),
        st.lists(
            st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 1), st.integers(1, 2), st.integers(0, 2)),
            min_size=1,
            max_size=3,
        ),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.booleans(),
    )
    def test_conv(
        n: int,
        channels: tuple[int, int, int],
        geometry: list[tuple[int, int, int, int, int]],
        dtype: torch.dtype,
        strided: bool,
        split: bool,
    ) -> None:
        groups, out, into = channels
        kernel, step, pad, dilation, more = (list(column) for column in zip(*geometry, strict=True))
        reach = [(k - 1) * e + 1 for k, e in zip(kernel, dilation, strict=True)]
        spatial = [max(1, r - 2 * p) + m for r, p, m in zip(reach, pad, more, strict=True)]
        places = [(x + 2 * p - r) // s + 1 for x, p, r, s in zip(spatial, pad, reach, step, strict=True)]
        d = values(n, out * groups, *places, dtype=dtype, seed=0, strided=strided)
        x = values(n, into * groups, *spatial, dtype=dtype, seed=1, strided=strided)
        arguments = (kernel, step, pad, dilation, groups)
        want = reference.sum_grad_squared_conv(d.double(), x.double(), *arguments)
        with multiplying(dtype, split):
            check(fisher_conv.sum_grad_squared_conv_, tuple(want.shape), want, d, x, *arguments)

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize(("n", "t"), [(3, 20), (2, 64), (5, 130)])
    def test_blocks_read_by_the_copy_engine(n: int, t: int, dtype: torch.dtype) -> None:
        """Whose edges the weight's are not; each sample's last block of places has zeros."""
        d, a = (values(n, t, size, dtype=dtype, seed=size, strided=False) for size in (80, 144))
        want = reference.sum_grad_squared_linear(d.double(), a.double())
        with (
            multiplying(dtype, split=True),
            mock.patch.object(_contraction, "has_copy_engine", return_value=True) as asked,
        ):
            check(fisher.sum_grad_squared_linear_, (80, 144), want, d, a)
        assert asked.called

    @pytest.mark.parametrize("groups", [1, 2])
    def test_a_convolution_of_one_place_with_channels_last(groups: int) -> None:
        """A linear layer to the copy engine, unless it has groups."""
        d, x = (torch.randn(3, channels, 4, 5).bfloat16() for channels in (64, 96))
        d, x = (t.to(memory_format=torch.channels_last) for t in (d, x))
        arguments = [1, 1], [1, 1], [0, 0], [1, 1], groups
        want = reference.sum_grad_squared_conv(d.double(), x.double(), *arguments)
        with (
            multiplying(torch.bfloat16, split=True),
            mock.patch.object(_contraction, "has_copy_engine", return_value=True),
        ):
            check(fisher_conv.sum_grad_squared_conv_, tuple(want.shape), want, d, x, *arguments)

    def test_samples_have_their_turn_where_copies_would_take_much(monkeypatch: pytest.MonkeyPatch) -> None:
        d, a = (values(7, 5, size, dtype=torch.float32, seed=0, strided=False) for size in (20, 30))
        want = reference.sum_grad_squared_linear(d.double(), a.double())
        monkeypatch.setattr(_contraction, "PACKED_BYTES", 3 * 2 * 4 * 5 * 50)  # three samples
        with multiplying(torch.float32, split=True):
            check(fisher.sum_grad_squared_linear_, (20, 30), want, d, a)

    @pytest.mark.filterwarnings("ignore:invalid value encountered in subtract:RuntimeWarning")  # NumPy's, of infinities
    @few
    @given(st.integers(2, 40), st.booleans())
    def test_packing(channels: int, split: bool) -> None:
        """Patches of a kernel of two planes, in two parts of 11 bits each; what is not a number stays so."""
        x = values(3, channels, 2, 4, 6, dtype=torch.float32, seed=0, strided=True)
        x = torch.cat([x, x.new_tensor([torch.inf, -torch.inf, torch.nan]).expand(3, channels, 2, 4, 3)], dim=4)
        patches = _packing.Patches((1, 4, 8), (2, 3, 2), (1, 1, 1), (0, 1, 0), (1, 1, 1))
        out = _packing.packed(x, patches, split)
        assert patches.shifted(4) == (0, 32)
        padded = torch.nn.functional.pad(x, (0, 0, 1, 1))
        padded = torch.stack([padded[:, :, :, i : i + 4, j : j + 8] for i in range(3) for j in range(2)], dim=2)
        padded = padded.flatten(3)
        if split:
            high, low = out.double()
            assert_close(torch.nan_to_num(high + low, 0, 0, 0), torch.nan_to_num(padded, 0, 0, 0), torch.float32)
            finite = padded.isfinite()
            assert torch.equal(high.isfinite(), finite)
            assert (out[:, finite].view(torch.int32) & 0x1FFF).count_nonzero() == 0
            assert ((high + low - padded)[finite].abs() <= 2.0**-22 * padded[finite].abs()).all()
        else:
            assert torch.equal(out[0].view(torch.int32), padded.view(torch.int32))

    @few
    @given(
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, 70),
        sizes,
        st.sampled_from(DTYPES),
        st.booleans(),
    )
    def test_bias_and_scale(n: int, a: int, c: int, b: int, dtype: torch.dtype, strided: bool) -> None:
        d = values(n, a, c, b, dtype=dtype, seed=0, strided=strided)
        x = values(n, a, c, b, dtype=dtype, seed=1, strided=strided)
        bias = reference.sum_grad_squared_bias(d.double())
        scale = reference.sum_grad_squared_scale(d.double(), x.double())
        check(fisher_channel.sum_grad_squared_bias_, (c,), bias, d)
        check(fisher_channel.sum_grad_squared_scale_, (c,), scale, d, x)
        shift = values(c, dtype=torch.float32, seed=2, strided=False)
        centred = reference.sum_grad_squared_scale(d.double(), x.double(), shift.double())
        check(fisher_channel.sum_grad_squared_scale_, (c,), centred, d, x, shift)
        other = torch.ones(c)
        check(fisher_channel.sum_grad_squared_scale_, (c,), centred, d, x, shift, other)
        assert_close(other, 1 + bias, torch.float32)

    @few
    @given(st.integers(0, 4), st.integers(0, 70), st.integers(0, 150), st.sampled_from(DTYPES), st.booleans())
    def test_norm(n: int, t: int, c: int, dtype: torch.dtype, strided: bool) -> None:
        d, x = (values(n, t, c, dtype=dtype, seed=seed, strided=strided) for seed in (0, 1))
        mean, rstd = (values(n, t, dtype=torch.float32, seed=seed, strided=strided) for seed in (2, 3))
        normalised = (x.double() - mean.double()[:, :, None]) * rstd.double()[:, :, None]
        want = reference.sum_grad_squared_scale(d.double()[..., None], normalised[..., None])
        bias = torch.ones(c)
        arguments = bias, d, x, mean, rstd
        check(fisher_channel.sum_grad_squared_norm_, (c,), want, *arguments)
        assert_close(bias, 1 + reference.sum_grad_squared_bias(d.double()[..., None]), torch.float32)
        check(fisher_channel.sum_grad_squared_norm_, (c,), want, None, *arguments[1:])

    def test_few_samples_of_many_places() -> None:
        """Programs share a sample's places."""
        d, x = (values(2, 700, 40, 1, dtype=torch.float32, seed=seed, strided=False) for seed in (0, 1))
        check(
            fisher_channel.sum_grad_squared_scale_,
            (40,),
            reference.sum_grad_squared_scale(d.double(), x.double()),
            d,
            x,
        )

    @few
    @given(st.integers(0, 4), st.integers(0, 9), st.integers(0, 40), st.sampled_from(DTYPES), st.booleans())
    def test_embedding(n: int, t: int, e: int, dtype: torch.dtype, strided: bool) -> None:
        d = values(n, t, e, dtype=dtype, seed=0, strided=strided)
        indices = torch.randint(0, 5, (n, t), generator=torch.Generator().manual_seed(2))
        for padding_idx in (-1, 2):
            want = reference.sum_grad_squared_embedding(d.double(), indices, 6, padding_idx)
            launch = fisher_embedding.sum_grad_squared_embedding_
            check(launch, (6, e), want, d, indices, padding_idx)

    def test_embedding_refuses_an_index_outside_the_table() -> None:
        for index in (-1, 6):
            with pytest.raises(RuntimeError, match="indices"):
                fisher_embedding.sum_grad_squared_embedding_(
                    torch.zeros(6, 2), torch.ones(1, 1, 2), torch.tensor([[index]]), -1
                )

    def test_tiles_that_share_samples_and_tiles_that_do_not() -> None:
        """Several tiles along both sides, whole and in part, with every way to combine partial sums."""
        for n, t, o, i in ((3, 20, 130, 70), (300, 2, 3, 5), (300, 1, 3, 5), (2, 1, 70, 130)):
            d = values(n, t, o, dtype=torch.float32, seed=0, strided=False)
            a = values(n, t, i, dtype=torch.float32, seed=1, strided=False)
            want = reference.sum_grad_squared_linear(d.double(), a.double())
            check(fisher.sum_grad_squared_linear_, (o, i), want, d, a)

    def test_the_fastest_tile_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
        """With a stopwatch that likes each trial better than the one before: the last tile is chosen."""
        trials: list[float] = []

        def stopwatch(call: Callable[[], None], quantiles: object) -> list[float]:
            call()
            trials.append(-float(len(trials)))
            return trials[-1:] * 3

        monkeypatch.setattr(_tuning, "milliseconds", stopwatch)
        monkeypatch.setattr(_tuning, "WORTH_TUNING", 1)
        monkeypatch.setattr(_tuning, "_fastest", {})
        for n, t in ((2, 20), (40, 2)):  # one share, which adds to the total, and several
            d = values(n, t, 128, dtype=torch.float32, seed=0, strided=False)
            a = values(n, t, 128, dtype=torch.float32, seed=1, strided=False)
            with monkeypatch.context() as patch:
                patch.setattr(_tuning, "can_measure", lambda device: False)
                unmeasured = torch.ones(128, 128)
                fisher.sum_grad_squared_linear_(unmeasured, d, a)
            for measured in (True, False):
                trials.clear()
                with monkeypatch.context() as patch:
                    patch.setattr(_tuning, "can_measure", lambda device: True)
                    total = torch.ones(128, 128)
                    fisher.sum_grad_squared_linear_(total, d, a)
                assert len(trials) == (4 if measured else 0)
                assert_close(total, unmeasured.double())
        assert {tile.rows * tile.columns for tile in _tuning._fastest.values()} == {128 * 128}

    def test_the_same_inputs_give_the_same_bits() -> None:
        d = values(40, 5, 20, dtype=torch.float32, seed=0, strided=False)
        a = values(40, 5, 33, dtype=torch.float32, seed=1, strided=False)
        first, second = torch.zeros(20, 33), torch.zeros(20, 33)
        fisher.sum_grad_squared_linear_(first, d, a)
        fisher.sum_grad_squared_linear_(second, d, a)
        assert torch.equal(first, second)

    @few
    @given(
        st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=3),
        st.tuples(*[st.sampled_from(DTYPES)] * 3),
        st.booleans(),
        st.booleans(),
    )
    def test_path_integral(
        shapes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, ...], penalty: bool, strided: bool
    ) -> None:
        step = step_inputs(shapes, *dtypes)
        if strided:
            step["grads"] = [torch.stack([g, g], dim=-1)[..., 0] for g in step["grads"]]
            step["integrals"] = [torch.stack([t, t], dim=-1)[..., 0] for t in step["integrals"]]
        check_path_integral(step if penalty else without_penalty(step), update=path_integral.path_integral_update_)

    @few
    @given(
        st.sampled_from(
            [((37, 70), -1), ((2, 3, 33), -1), ((2, 40, 5, 3), 1), ((0, 4), -1), ((3, 17), 1), ((140, 5), -1)]
        ),
        st.sampled_from(DTYPES),
        st.booleans(),
        st.booleans(),
        st.tuples(*[st.booleans()] * 3),
    )
    def test_gated_lateral(
        layout: tuple[tuple[int, ...], int],
        dtype: torch.dtype,
        with_bias: bool,
        strided: bool,
        wanted: tuple[bool, bool, bool],
    ) -> None:
        shape, channel_dim = layout
        channels = shape[channel_dim]
        x, h, grad = (values(*shape, dtype=dtype, seed=k, strided=strided) for k in range(3))
        weight = values(channels, channels, dtype=dtype, seed=3, strided=strided) / channels**0.5
        bias = values(channels, dtype=dtype, seed=4, strided=strided) if with_bias else None
        wide = [None if t is None else t.double() for t in (x, h, weight, bias)]
        y, product = gated_lateral.gated_lateral(x, h, weight, bias, channel_dim, True)
        assert_close(y, reference.gated_lateral(*wide, channel_dim))
        assert_close(product, reference.gate_product(wide[1], wide[2], channel_dim))
        forgotten = gated_lateral.gated_lateral(x, h, weight, bias, channel_dim, False)
        assert_close(forgotten[0], y.double())
        assert forgotten[1].numel() == 0
        wants = (*wanted, with_bias)
        got = gated_lateral.gated_lateral_backward(grad, x, h, weight, bias, product, channel_dim, wants)
        want = reference.gated_lateral_backward(grad.double(), *wide, product.double(), channel_dim)
        for a, b, wish in zip(got, want, wants, strict=True):
            if wish:
                assert_close(a, b)
            else:
                assert a.numel() == 0

    @pytest.mark.parametrize("seen", [0, 1, 777, 2**40 + 1, 2**62 + 2**61])
    @pytest.mark.parametrize("capacity", [1, 300, 2**61])
    def test_reservoir_slots(seen: int, capacity: int) -> None:
        got, want = torch.empty(1300, dtype=torch.int64), torch.empty(1300, dtype=torch.int64)
        reservoir.reservoir_slots_(got, seen, capacity, 2**62 + 3)
        reference.reservoir_slots_(want, seen, capacity, 2**62 + 3)
        assert torch.equal(got, want)

    @pytest.mark.parametrize("row", [(), (3,), (2, 5000)])
    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float32])
    def test_reservoir_insert(row: tuple[int, ...], dtype: torch.dtype) -> None:
        kept = []
        batches = [torch.randint(100, (count, *row)).to(dtype) for count in (7, 1, 0, 30)]
        for backend in (reservoir, reference):
            stored = [torch.zeros(12, *row, dtype=dtype), torch.zeros(12, 0)]
            items, seen = torch.full((12,), -1), torch.tensor(0)
            for batch in batches:
                backend.reservoir_insert_(stored, items, seen, [batch, torch.zeros(batch.shape[0], 0)], 9)
            kept.append((stored[0], items, seen))
        assert all(map(torch.equal, *kept))

    @pytest.mark.parametrize(("population", "count"), [(1, 1), (9, 9), (40, 30), (10**12, 200), (2**63 - 1, 3)])
    def test_sample_without_replacement(population: int, count: int) -> None:
        got, want = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        reservoir.sample_without_replacement_(got, population, 5, 2**33 + 1)
        reference.sample_without_replacement_(want, population, 5, 2**33 + 1)
        assert torch.equal(got, want)

    def test_gather_rows() -> None:
        stored = [torch.randn(20, 3, 7), torch.arange(20, dtype=torch.int16), torch.zeros(20, 0)]
        index = torch.tensor([3, 19, 0, 3])
        rows = [field.new_empty((4, *field.shape[1:])) for field in stored]
        reservoir.gather_rows_(rows, stored, index)
        assert all(torch.equal(out, field[index]) for out, field in zip(rows, stored, strict=True))
