"""Draw the image subset that ships with limpet: ``python -m limpet.scenarios.make_subset SOURCE TARGET``.

SOURCE is a folder with the training files of MNIST; TARGET receives four IDX files. Test images, too, come from
the *training* file, so that MNIST's own test set stays unseen by whoever tunes on the subset.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from limpet.scenarios.datasets import NUM_CLASSES
from limpet.scenarios.idx import read_labelled, write_idx

TRAIN_PER_CLASS = 1000
TEST_PER_CLASS = 200
SEED = 0


def draw(
    labels: npt.NDArray[np.uint8],  # [N]
    train_per_class: int,
    test_per_class: int,
    seed: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Draw disjoint rows for training and for testing, as many of every class, each in the file's order.

    Returns:
        The rows for training [classes * train_per_class] and for testing [classes * test_per_class], ascending.

    Raises:
        ValueError: a class has too few rows.
    """
    rng = np.random.default_rng(seed)
    train, test = [], []
    for label in range(NUM_CLASSES):
        rows = np.flatnonzero(labels == label)
        if len(rows) < train_per_class + test_per_class:
            raise ValueError(f"class {label} must have {train_per_class + test_per_class} rows, got {len(rows)}")
        drawn = rng.choice(rows, train_per_class + test_per_class, replace=False)
        train.append(drawn[:train_per_class])
        test.append(drawn[train_per_class:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def make_subset(
    source: Path,
    target: Path,
    *,
    train_per_class: int = TRAIN_PER_CLASS,
    test_per_class: int = TEST_PER_CLASS,
    seed: int = SEED,
) -> None:
    """Read the training files in ``source`` and write the subset's four files into ``target``."""
    images, labels = read_labelled(source / "train-images-idx3-ubyte.gz", source / "train-labels-idx1-ubyte.gz")
    target.mkdir(parents=True, exist_ok=True)
    for part, rows in zip(("train", "t10k"), draw(labels, train_per_class, test_per_class, seed), strict=True):
        write_idx(target / f"{part}-images-idx3-ubyte.gz", images[rows])
        write_idx(target / f"{part}-labels-idx1-ubyte.gz", labels[rows])


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the two folders and make the subset."""
    parser = argparse.ArgumentParser(prog="python -m limpet.scenarios.make_subset", description=make_subset.__doc__)
    parser.add_argument("source", type=Path, help="folder with MNIST's training files")
    parser.add_argument("target", type=Path, help="folder for the subset")
    folders = parser.parse_args(arguments)
    make_subset(folders.source, folders.target)


if __name__ == "__main__":
    main()
