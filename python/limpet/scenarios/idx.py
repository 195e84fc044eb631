"""IDX, the format of the MNIST family: a big-endian header, then the values; plain or gzipped.

The header is two zero bytes, a code for the type of the values, the number of dimensions, and each dimension as a
32-bit unsigned integer (Yann LeCun's MNIST page, "The IDX file format"). Files are read straight into the array that
is returned, so reading needs no second copy in memory.
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from limpet.scenarios._files import replacing

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_CODES = {np.dtype(name).newbyteorder("="): code for code, name in _TYPES.items()}
_GZIP_MAGIC = b"\x1f\x8b"
_DEFLATE_MAX_RATIO = 1032  # zlib's documented limit: no gzip file holds more than this many bytes per byte


def read_idx(path: str | os.PathLike[str], *, ndim: int | None = None) -> npt.NDArray[np.generic]:
    """Read an IDX file, plain or gzipped (told by its first bytes, not by its name).

    Args:
        path: the file.
        ndim: how many dimensions the array must have: 3 for images, 1 for labels.

    Returns:
        A writable array of the file's shape and type, in the machine's byte order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not IDX, has another number of dimensions, is damaged, or holds fewer or more bytes than
            its header says; the message names the file, what was expected and what was found.

    >>> import tempfile, numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_idx(folder + "/labels.gz", numpy.array([3, 1, 4], numpy.uint8))
    ...     read_idx(folder + "/labels.gz", ndim=1)
    array([3, 1, 4], dtype=uint8)
    """
    path = Path(path)
    with path.open("rb") as raw:
        zipped = raw.read(2) == _GZIP_MAGIC
        raw.seek(0)
        most = path.stat().st_size * (_DEFLATE_MAX_RATIO if zipped else 1)
        try:
            return _read(path, cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if zipped else raw, ndim, most)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({error})") from None


def _read(path: Path, stream: BinaryIO, ndim: int | None, most: int) -> npt.NDArray[np.generic]:
    """Parse one IDX stream of at most ``most`` bytes."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES:
        raise ValueError(f"{path}: expected an IDX file (first bytes 00 00, then a type code), got {magic.hex(' ')!r}")
    if ndim is not None and magic[3] != ndim:
        raise ValueError(f"{path}: expected an IDX array of {ndim} dimensions, got one of {magic[3]}")
    header = stream.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise ValueError(f"{path}: expected {magic[3]} dimensions in the header, got {len(header) // 4}")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    dtype = np.dtype(_TYPES[magic[2]])
    expected = math.prod(shape) * dtype.itemsize
    if expected > most:  # before allocating what a damaged header asks for
        raise ValueError(f"{path}: expected {expected} bytes of values for shape {shape}, got at most {most}")
    array = np.empty(shape, dtype)
    got = _fill(stream, array.reshape(-1).view(np.uint8).data) if expected else 0
    if got < expected:
        raise ValueError(f"{path}: expected {expected} bytes of values for shape {shape}, got {got}")
    if stream.read(1):  # reading to the end also makes gzip compare its checksum
        raise ValueError(f"{path}: expected {expected} bytes of values for shape {shape}, got more")
    return array.astype(dtype.newbyteorder("="), copy=False)


def _fill(stream: BinaryIO, target: memoryview) -> int:
    """Read until ``target`` is full or the stream ends; how many bytes were read."""
    done = 0
    while done < len(target) and (count := stream.readinto(target[done:])):  # type: ignore[attr-defined]
        done += count
    return done


def read_labelled(
    images: str | os.PathLike[str], labels: str | os.PathLike[str]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Read a file of images and the file of their labels.

    Returns:
        Images [N, H, W] and labels [N], both uint8.

    Raises:
        FileNotFoundError: one of them does not exist.
        ValueError: one of them is not IDX with unsigned bytes, or they do not hold the same number.
    """
    pictures, classes = read_idx(images, ndim=3), read_idx(labels, ndim=1)
    for path, array in ((images, pictures), (labels, classes)):
        if array.dtype != np.uint8:
            raise ValueError(f"{path}: expected unsigned bytes, got {array.dtype}")
    if len(pictures) != len(classes):
        raise ValueError(
            f"{labels}: expected {len(pictures)} labels, one for each image of {images}, got {len(classes)}"
        )
    return cast("npt.NDArray[np.uint8]", pictures), cast("npt.NDArray[np.uint8]", classes)


def write_idx(path: str | os.PathLike[str], array: npt.NDArray[np.generic]) -> None:
    """Write an IDX file, gzipped where the name ends in ``.gz``; the same array always gives the same bytes.

    Raises:
        ValueError: IDX has no code for the array's type, or the array has over 255 dimensions or 2**32 - 1 in one.
    """
    path = Path(path)
    code = _CODES.get(array.dtype.newbyteorder("="))
    if code is None or any(size >= 2**32 for size in array.shape):
        raise ValueError(f"array must be of a type and shape that IDX knows, got {array.dtype} {array.shape}")
    header = bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + np.ascontiguousarray(array, _TYPES[code]).tobytes()
    with replacing(path) as stream:
        stream.write(gzip.compress(content, compresslevel=9, mtime=0) if path.suffix == ".gz" else content)
