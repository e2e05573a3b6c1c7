"""Image files as the model sees them: one square tile of uint8 RGB.

What is done to a file, in this order: EXIF rotation is applied; transparency is laid over grey; the picture is scaled (bicubic, keeping its aspect ratio)
so that its longer side equals the tile; the rest of the tile is filled with mid-grey on both sides.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from megatron_ext.errors import DataError

GREY = (128, 128, 128)


def load_image(path: Path, image_size: int, expected_size: tuple[int, int] | None = None) -> np.ndarray:
    """Reads a file as uint8 [image_size, image_size, 3]. `expected_size` is the (width, height) that an annotation claims.

    Raises DataError, naming the file, when it is missing, no image, truncated or corrupt, of another size than claimed, or too thin to be scaled.
    """
    picture = _open(path)
    if expected_size is not None and picture.size != expected_size:
        raise DataError(str(path), f"is {_size(picture.size)}, but its line says {_size(expected_size)}", "mend the line or the file")
    return fit(picture, image_size, str(path))


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


def _open(path: Path) -> Image.Image:
    """A fully decoded picture: `verify` finds broken files that still open, `load` finds those whose pixels end early."""
    if not path.is_file():
        raise DataError(str(path), "there is no such image", "images are relative to the folder of the JSONL file")
    try:
        with Image.open(path) as picture:
            picture.verify()
        with Image.open(path) as picture:
            picture.load()
            return picture
    except Image.DecompressionBombError as error:
        raise DataError(str(path), f"has too many pixels ({error})", "scale it down first") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # PIL raises SyntaxError for a broken PNG
        raise DataError(str(path), f"is not a readable image: truncated, corrupt, or of an unknown format ({error})", "replace the file") from error


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels"
