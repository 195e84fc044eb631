"""Data sets of labelled images: a real MNIST subset that ships with the package, and full IDX files on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from limpet import _checks
from limpet.scenarios.idx import read_labelled

NAMES = ("mnist-subset", "mnist", "fashion-mnist")
NUM_CLASSES = 10
_SHIPPED = Path(__file__).parent / "data"
_PARTS = ("train", "t10k")


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images in a training and a test part, as they are stored: one byte a pixel."""

    name: str
    train_images: Tensor  # [N, H, W] uint8
    train_labels: Tensor  # [N] int64
    test_images: Tensor  # [M, H, W] uint8
    test_labels: Tensor  # [M] int64


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Load a data set of ten classes.

    Args:
        name: ``"mnist-subset"`` (10,000 training and 2,000 test images of MNIST's training file; ships with limpet),
            ``"mnist"`` or ``"fashion-mnist"``.
        data_dir: where the four files of the full sets are (``train-images-idx3-ubyte`` and so on, plain or ``.gz``),
            in this folder or in its subfolder ``name``. Not read for the subset.

    Returns:
        The images as uint8 [N, H, W] and the labels as int64 [N] in 0 to 9, on the CPU.

    Raises:
        ValueError: no such data set; ``data_dir`` is missing for a full set; a file is not what it says.
        FileNotFoundError: the folder lacks one of the files.

    >>> digits = load("mnist-subset")
    >>> list(digits.train_images.shape), list(digits.test_images.shape)
    ([10000, 28, 28], [2000, 28, 28])
    """
    _checks.one_of("name", name, NAMES)
    if name == "mnist-subset":
        folders = [_SHIPPED]
    elif data_dir is None:
        raise ValueError(f"data_dir must name the folder that holds the IDX files of {name!r}, got None")
    else:
        folders = [Path(data_dir), Path(data_dir) / name]
    (train_images, train_labels), (test_images, test_labels) = (_load_part(part, folders) for part in _PARTS)
    if train_images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"{name}: training and test images must have one size, got {list(train_images.shape[1:])} "
            f"and {list(test_images.shape[1:])}"
        )
    return ImageDataset(name, train_images, train_labels, test_images, test_labels)


def _load_part(part: str, folders: list[Path]) -> tuple[Tensor, Tensor]:
    """The images and the labels of one part, from the first folder that holds its images."""
    images = _find(f"{part}-images-idx3-ubyte", folders)
    labels = _find(f"{part}-labels-idx1-ubyte", [images.parent])
    pictures, classes = (torch.from_numpy(array) for array in read_labelled(images, labels))
    if not len(classes):
        raise ValueError(f"{images}: expected images, got an empty file")
    if int(classes.max()) >= NUM_CLASSES:
        raise ValueError(f"{labels}: expected labels from 0 to {NUM_CLASSES - 1}, got {int(classes.max())}")
    return pictures, classes.long()


def _find(stem: str, folders: list[Path]) -> Path:
    """The first of ``stem`` and ``stem.gz`` in any of the folders."""
    for folder in folders:
        for path in (folder / stem, folder / f"{stem}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"no {stem} or {stem}.gz in {' or '.join(map(str, folders))}")
