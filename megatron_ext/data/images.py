"""Pictures as the model sees them: square tiles of uint8 RGB.

`fit`: one tile. What is done to a file, in this order: EXIF rotation is applied; transparency is laid over grey; the picture is scaled (bicubic, keeping
its aspect ratio) so that its longer side equals the tile; the rest of the tile is filled with mid-grey on both sides.

`internvl`: what InternVL does, by transformers' own code: the grid of at most `max_tiles` tiles whose aspect ratio is nearest to the picture's, and, where
that is more than one tile, the whole picture once more as a thumbnail.

A file comes from anywhere: before anything of it is decoded it is of few enough bytes, of a format of `FORMATS`, and says that it has few enough pixels
(`data.max_image_bytes`, `data.max_image_pixels`). Of an animation the first picture counts.
"""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from megatron_ext.batch import Tiles
from megatron_ext.batch.tiles import grid_places
from megatron_ext.config.schema import DataConfig
from megatron_ext.errors import DataError

GREY = (128, 128, 128)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded: formats of cameras, screens and the web. Pillow knows dozens more, of which some start other programs (EPS) and few are looked after."""


class Part(Protocol):
    """An encoded picture in a larger file. Its text names it in errors."""

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int:
        """Bytes."""

    def read_bytes(self) -> bytes:
        """Raises OSError where it cannot be read."""


Picture = Path | Part


def load_image(source: Picture, config: DataConfig, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a picture as uint8 [image_size, image_size, 3]. `expected_size` is the (width, height) that an annotation claims.

    Raises DataError, naming the picture, when it is missing, too large, no image of a known format, truncated or corrupt, of another size than claimed, or too
    thin to be scaled.
    """
    return fit(open_picture(source, config, expected_size), config.image_size, str(source))


def load_tiles(source: Picture, config: DataConfig, expected_size: tuple[int, int] | None = None) -> Tiles:
    """The tiles of a picture, as `config.image_processing` says. Raises DataError like `load_image`."""
    if config.image_processing == "fit":
        return Tiles.whole(load_image(source, config, expected_size)[None])
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    picture = ImageOps.exif_transpose(open_picture(source, config, expected_size)).convert("RGB")
    made = _tiler(config.image_size, config.max_tiles)(images=[picture])
    pixels_IHWC = np.stack([np.asarray(tile).transpose(1, 2, 0).astype(np.uint8) for tile in made["pixel_values"]])
    columns, rows = get_optimal_tiled_canvas((picture.height, picture.width), (config.image_size, config.image_size), 1, config.max_tiles)
    return Tiles(pixels_IHWC, grid_places(rows, columns))


@lru_cache(maxsize=2)
def _tiler(image_size: int, max_tiles: int) -> Any:
    """Pixels stay whole numbers: scaling to means and deviations is the model's, where every image goes through."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    size = {"height": image_size, "width": image_size}
    return GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=max_tiles, do_rescale=False, do_normalize=False)


def fit(picture: Image.Image, image_size: int, where: str) -> np.ndarray:
    """Any PIL picture as one tile, as the module says."""
    picture = ImageOps.exif_transpose(picture)
    scale = image_size / max(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    if not (width and height):
        raise DataError(
            where, f"is {_size(picture.size)}: nothing is left of its shorter side at {image_size} pixels", "crop the picture or raise data.image_size"
        )
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, (*GREY, 255)), picture.convert("RGBA"))
    scaled = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    tile = Image.new("RGB", (image_size, image_size), GREY)
    tile.paste(scaled, ((image_size - width) // 2, (image_size - height) // 2))
    return np.asarray(tile)


def open_picture(source: Picture, config: DataConfig, expected_size: tuple[int, int] | None = None) -> Image.Image:
    """A fully decoded picture of the size that its line claims: `verify` finds broken files that still open, `load` finds those whose pixels end early. Raises
    DataError like `load_image`."""
    try:
        encoded = BytesIO(_read(source, config.max_image_bytes))
        with Image.open(encoded, formats=FORMATS) as picture:
            _require_few_pixels(picture.size, config.max_image_pixels, str(source))
            picture.verify()
        encoded.seek(0)
        with Image.open(encoded, formats=FORMATS) as picture:
            picture.load()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError(str(source), "there is no such image", "images are relative to the folder of the JSONL file") from error
    except Image.DecompressionBombError as error:
        raise DataError(str(source), f"has too many pixels ({error})", "scale it down first") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # PIL raises SyntaxError for a broken PNG
        problem = f"is not a readable image: truncated, corrupt, or of another format than {', '.join(FORMATS)} ({error})"
        raise DataError(str(source), problem, "replace or convert the file") from error
    if expected_size is not None and picture.size != expected_size:
        raise DataError(str(source), f"is {_size(picture.size)}, but its line says {_size(expected_size)}", "mend the line or the file")
    return picture


def _read(source: Picture, most_bytes: int) -> bytes:
    size = source.stat().st_size if isinstance(source, Path) else source.size
    if size > most_bytes:
        problem = f"has {size} bytes, more than data.max_image_bytes = {most_bytes}"
        raise DataError(str(source), problem, "scale or compress the picture, or raise data.max_image_bytes")
    return source.read_bytes()


def _require_few_pixels(size: tuple[int, int], most: int, where: str) -> None:
    if size[0] * size[1] > most:
        problem = f"is {_size(size)}, more than data.max_image_pixels = {most} in all"
        raise DataError(where, problem, "scale the picture down, or raise data.max_image_pixels")


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
