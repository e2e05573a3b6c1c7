"""Where a prompt's pictures were read from, as JSON values in its `meta`: a tool that looks at one again, such as a zoom, opens the original by it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from megatron_ext.batch import Prompt
from megatron_ext.config.schema import DataConfig
from megatron_ext.data.images import Picture, open_picture
from megatron_ext.data.webdataset import Slice

PICTURES = "pictures"


def reference(picture: Picture) -> list[str | int]:
    """[path], or [shard, name, offset, bytes] of one in a shard."""
    if isinstance(picture, Path):
        return [str(picture.absolute())]
    if isinstance(picture, Slice):
        return [str(picture.shard.absolute()), picture.name, picture.offset, picture.size]
    raise TypeError(f"{picture} is neither a file nor in a shard")


def original(prompt: Prompt, number: int, config: DataConfig) -> Image.Image:
    """The picture `number` of a prompt, from its file, held to the limits of `config`; a prompt that was drawn (the suite's) has its first tile as the
    original. Raises DataError where the file cannot be read, IndexError where the prompt has no such picture."""
    references = prompt.meta.get(PICTURES)
    if not isinstance(references, Sequence) or not references:
        return Image.fromarray(prompt.tiles.loaded().pixels_IHWC[number])
    path, *part = references[number]
    return open_picture(Slice(Path(path), *part) if part else Path(path), config)
