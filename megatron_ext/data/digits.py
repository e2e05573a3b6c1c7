"""Real handwritten digits for the suite: the 1797 images of 8 x 8 pixels that ship inside scikit-learn.

The data file is read as it lies in the installed package; scikit-learn itself is never imported (that would cost every worker a second).
Digit files are split by index, so that no handwriting seen in training is asked about in a test.
"""

from __future__ import annotations

import gzip
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_ext.errors import DataError

Split = Literal["train", "val", "test"]

DIGIT_FILES: dict[Split, range] = {"train": range(1200), "val": range(1200, 1497), "test": range(1497, 1797)}


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    """Integers [1797, 65]: 64 pixels from 0 to 16, then the label. Raises DataError when scikit-learn is not installed."""
    package = importlib.util.find_spec("sklearn")
    folder = Path(package.origin).parent if package is not None and package.origin else None
    path = folder / "datasets" / "data" / "digits.csv.gz" if folder else None
    if path is None or not path.is_file():
        raise DataError(
            "data.real_digits", "scikit-learn, which holds the handwritten digits, is not installed", "install scikit-learn or set data.real_digits=0"
        )
    with gzip.open(path, "rt") as lines:
        return np.loadtxt(lines, delimiter=",", dtype=np.int64)


def digit_masks() -> np.ndarray:
    """Ink of every digit file, float32 [1797, 8, 8] in [0, 1]."""
    return (_table()[:, :64].reshape(-1, 8, 8) / 16).astype(np.float32)


@lru_cache(maxsize=3)
def digit_files(split: Split) -> dict[str, tuple[int, ...]]:
    """File indices of each digit "0".."9" that belong to the split."""
    labels = _table()[:, 64]
    return {str(digit): tuple(index for index in DIGIT_FILES[split] if labels[index] == digit) for digit in range(10)}
