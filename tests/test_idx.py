"""The IDX reader: round trips, and every way in which a file can be wrong."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from limpet.scenarios.idx import read_idx, read_labelled, write_idx


@given(
    dtype=st.sampled_from(["u1", "i1", "i2", "i4", "f4", "f8"]),
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    suffix=st.sampled_from(["", ".gz"]),
)
def test_round_trip(tmp_path_factory, dtype, shape, suffix):
    path = tmp_path_factory.mktemp("idx") / f"array{suffix}"
    array = (np.arange(np.prod(shape)) % 100).reshape(shape).astype(dtype)
    write_idx(path, array)
    read = read_idx(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def test_the_format_byte_by_byte(tmp_path):
    path = tmp_path / "values"
    path.write_bytes(bytes([0, 0, 0x0B, 2]) + struct.pack(">IIhh", 1, 2, 258, -2))
    assert read_idx(path, ndim=2).tolist() == [[258, -2]]


def labels(count):
    return bytes([0, 0, 8, 1]) + struct.pack(">I", count) + bytes(range(count))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (labels(5)[:-1], r"expected 5 bytes of values for shape \(5,\), got"),
        (labels(5) + b"x", r"expected 5 bytes of values for shape \(5,\), got more"),
        (b"", "expected an IDX file .*, got ''"),
        (b"\x89PNG....", "expected an IDX file .*, got '89 50 4e 47'"),
        (b"\x00\x00\x07\x01" + bytes(8), "expected an IDX file"),
        (b"\x00\x00\x08\x03" + bytes(16), "expected an IDX array of 1 dimensions, got one of 3"),
        (b"\x00\x00\x08\x01\x00", "expected 1 dimensions in the header, got 0"),
        (b"\x00\x00\x08\x01\xff\xff\xff\xff" + bytes(9), "expected 4294967295 bytes of values"),
        (gzip.compress(labels(5), mtime=0)[:-3], "expected a whole gzip file, got a damaged one"),
        (gzip.compress(labels(5), mtime=0)[:-8] + bytes(8), "expected a whole gzip file, got a damaged one"),
        (gzip.compress(labels(5)[:-1], mtime=0), r"expected 5 bytes of values for shape \(5,\), got 4"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "labels"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path, ndim=1)
    assert str(path) in str(error.value)


def test_images_and_labels_must_be_as_many(tmp_path):
    write_idx(tmp_path / "images", np.zeros((3, 2, 2), np.uint8))
    write_idx(tmp_path / "labels", np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"labels: expected 3 labels, one for each image of .*images, got 4"):
        read_labelled(tmp_path / "images", tmp_path / "labels")
    write_idx(tmp_path / "labels", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"expected unsigned bytes, got int32"):
        read_labelled(tmp_path / "images", tmp_path / "labels")


def test_a_missing_file():
    with pytest.raises(FileNotFoundError):
        read_idx("nowhere/labels")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "labels"
    write_idx(path, np.zeros(3, np.uint8))
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_idx(path, np.ones(9, np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
