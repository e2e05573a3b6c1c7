"""Tiles on disk, by the hash of what they show. Prompts that hold stored tiles travel between processes as a path; pixels are read where they are looked at.

    ImageStore.keep(tiles) -> folder/<digest>.npy, once -> StoredTiles -> pickle: path and shape -> mapped and checked when their pixels are asked for

A file holds two arrays in numpy's own format, pixels and then places: `np.load` reads the first. Here headers are compared with what they must be and not
parsed: numpy parses them with `ast`, which two threads of Python 3.11 must not do at once (python/cpython#106905).
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from megatron_ext.batch.rollout import Prompt
from megatron_ext.batch.tiles import NO_TILES, Tiles
from megatron_ext.durable import durable_file, make_folder, remove_drafts
from megatron_ext.errors import StorageError


class StoredTiles(Tiles):
    """Tiles in the file `path`, which is named after their digest. How many there are is known without it.

    Every look at the pixels maps the file anew and checks it, so that whoever only passes tiles on holds neither memory nor open files: keep what `loaded`
    returns. Raises StorageError where the file is missing or damaged.
    """

    def __init__(self, path: Path, shape: Sequence[int]) -> None:
        object.__setattr__(self, "path", path)
        object.__setattr__(self, "_shape", tuple(shape))

    path: Path
    _shape: tuple[int, ...]

    @property
    def digest(self) -> str:
        return self.path.stem

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def pixels_IHWC(self) -> np.ndarray:
        return self.loaded().pixels_IHWC

    @property
    def places_I5(self) -> np.ndarray:
        return self.loaded().places_I5

    def loaded(self) -> Tiles:
        pixels, places = _header(self._shape, np.uint8), _header((self._shape[0], 5), np.float32)
        try:
            with self.path.open("rb") as file:
                before = file.read(len(pixels))
                file.seek(math.prod(self._shape), io.SEEK_CUR)
                if (before, file.read(len(places))) != (pixels, places):
                    raise ValueError(f"it does not hold uint8 {self._shape} and their places")
                places_I5 = np.fromfile(file, np.float32, self._shape[0] * 5).reshape(-1, 5)
            tiles = Tiles(np.asarray(np.memmap(self.path, np.uint8, "r", len(pixels), self._shape)), places_I5)
        except (OSError, ValueError) as error:
            raise self._unusable(f"cannot be read ({error})") from error
        if tiles_digest(tiles) != self.digest:
            raise self._unusable(f"holds other tiles than its name says: their digest is {tiles_digest(tiles)}")
        return tiles

    def _unusable(self, problem: str) -> StorageError:
        return StorageError(str(self.path), problem, "run again: images of prompts that are drawn anew are stored anew where their file is damaged")

    def __reduce__(self) -> tuple[type[StoredTiles], tuple[Path, tuple[int, ...]]]:
        return StoredTiles, (self.path, self._shape)


class ImageStore:
    """The one writer of `folder`; readers need no store."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        make_folder(self._folder)
        remove_drafts(self._folder)

    def keep(self, tiles: Tiles) -> Tiles:
        """The same tiles, stored, their file on disk when this returns; no tiles as they are. A file that is there is used if it is whole, else written
        anew. Raises StorageError when the operating system refuses it."""
        if not len(tiles) or (isinstance(tiles, StoredTiles) and tiles.path.parent == self._folder):
            return tiles
        tiles = tiles.loaded()
        stored = find_tiles(self._folder, tiles_digest(tiles), tiles.shape)
        assert isinstance(stored, StoredTiles)
        if not _is_whole(stored):
            with durable_file(stored.path) as file:
                np.save(file, np.ascontiguousarray(tiles.pixels_IHWC, np.uint8))
                np.save(file, np.ascontiguousarray(tiles.places_I5, np.float32))
        return stored


def find_tiles(folder: Path, digest: str, shape: Sequence[int]) -> Tiles:
    """Tiles that were kept in `folder`, their file not yet looked at; without a digest no tiles."""
    return StoredTiles(folder.absolute() / f"{digest}.npy", shape) if digest else NO_TILES


def stored(prompts: Sequence[Prompt], store: ImageStore) -> list[Prompt]:
    """The same prompts, with their images in the store."""
    return [replace(prompt, tiles=store.keep(prompt.tiles)) for prompt in prompts]


def distinct_bytes(prompts: Iterable[Prompt]) -> int:
    """What the images of these prompts take, each once: a prompt's, and those that are stored as one."""
    tiles = {prompt.key: prompt.tiles for prompt in prompts}
    return sum({of.digest if isinstance(of, StoredTiles) else key: of.nbytes for key, of in tiles.items()}.values())


def tiles_digest(tiles: Tiles) -> str:
    """Over pixels, places and their shapes; XXH3, 128 bits: against accidents, as of weights on their way."""
    hasher = xxhash.xxh3_128(repr(tiles.shape).encode())
    hasher.update(np.ascontiguousarray(tiles.pixels_IHWC, np.uint8).data)
    hasher.update(np.ascontiguousarray(tiles.places_I5, np.float32).data)
    return hasher.hexdigest()


def _header(shape: tuple[int, ...], dtype: type[np.generic]) -> bytes:
    """What `np.save` writes before an array."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": np.lib.format.dtype_to_descr(np.dtype(dtype))})
    return file.getvalue()


def _is_whole(stored: StoredTiles) -> bool:
    try:
        stored.loaded()
    except StorageError:
        return False
    return True
