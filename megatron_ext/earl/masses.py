"""The masses of all prompts, in memory or in a file, read a few layers at a time: what discovery holds at once does not grow with the number of layers.

    survey: rows as they come -> `mass_file` -> mass.npy, [L, N, E]: a layer lies in one piece -> `MassFile.layers` -> float64 [N, l, E]

The file is a plain .npy, so that numpy opens it as it is. L layers, N prompts, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from megatron_ext.durable import durable_file
from megatron_ext.errors import UserError
from megatron_ext.shapes import check_shape


class MassSource(Protocol):
    """`shape` is (prompts, layers, experts); `layers` gives those of layers [start, stop)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def layers(self, start: int, stop: int) -> np.ndarray:
        """float64 [N, stop - start, E]."""
        ...


class MassArray:
    """Masses that fit in memory."""

    def __init__(self, mass_NLE: np.ndarray) -> None:
        check_shape("mass_NLE", mass_NLE, None, None, None)
        self._mass_NLE = mass_NLE

    @property
    def shape(self) -> tuple[int, int, int]:
        prompts, layers, experts = self._mass_NLE.shape
        return prompts, layers, experts

    def layers(self, start: int, stop: int) -> np.ndarray:
        return np.asarray(self._mass_NLE[:, start:stop], dtype=np.float64)


class MassFile:
    """Masses in a file that `mass_file` has written. Nothing of it is kept in memory. Raises UserError for a file that is none, or has been cut off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                (layers, prompts, experts), by_columns, self._dtype = read_header(file)
                self._begin = file.tell()
        except (OSError, ValueError) as error:
            raise UserError(str(path), f"cannot be read: {error}", "run `discover` again") from None
        self.shape = (prompts, layers, experts)
        size = self._begin + layers * prompts * experts * self._dtype.itemsize
        if by_columns or self._dtype.kind != "f" or path.stat().st_size != size:
            problem = f"{path.stat().st_size} bytes of {self._dtype}, {size} are needed for {layers} layers of {prompts} prompts and {experts} experts"
            raise UserError(str(path), problem, "run `discover` again")

    shape: tuple[int, int, int]

    def layers(self, start: int, stop: int) -> np.ndarray:
        prompts, _, experts = self.shape
        first = self._begin + start * prompts * experts * self._dtype.itemsize
        mass_lNE = np.fromfile(self._path, self._dtype, (stop - start) * prompts * experts, offset=first).reshape(stop - start, prompts, experts)
        return mass_lNE.transpose(1, 0, 2).astype(np.float64, order="C")


class MassWriter:
    """Rows of a file under way, in any order."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], dtype: np.dtype) -> None:
        self._file, self._shape, self._dtype = file, shape, dtype
        prompts, layers, experts = shape
        header = {"shape": (layers, prompts, experts), "fortran_order": False, "descr": np.lib.format.dtype_to_descr(dtype)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        self._begin = file.tell()
        os.truncate(file.fileno(), self._begin + layers * prompts * experts * dtype.itemsize)

    def write(self, row: int, first_layer: int, mass_lE: np.ndarray) -> None:
        """The masses of prompt `row` in the layers from `first_layer` on."""
        prompts, layers, experts = self._shape
        check_shape("mass_lE", mass_lE, None, experts)
        if not (0 <= row < prompts and 0 <= first_layer <= layers - len(mass_lE)):
            raise IndexError(f"row {row}, layers from {first_layer} on: the file has {prompts} rows and {layers} layers")
        for layer, mass_E in enumerate(mass_lE.astype(self._dtype), first_layer):
            os.pwrite(self._file.fileno(), mass_E.tobytes(), self._begin + (layer * prompts + row) * experts * self._dtype.itemsize)


@contextmanager
def mass_file(path: Path, shape: tuple[int, int, int], dtype: np.dtype) -> Iterator[MassWriter]:
    """Writes masses of `shape` (prompts, layers, experts) as `dtype` (float16, 32 or 64); the file has its name when the block ends, and is on disk. What was
    not written is 0."""
    with durable_file(path) as file:
        yield MassWriter(file, shape, dtype)
