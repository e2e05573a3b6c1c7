"""Tar shards of small samples, for tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(number: int, form: str = "PNG") -> bytes:
    """32 x 32 pixels of one colour, whose red is the number."""
    encoded = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), (number % 256, 10, 200), np.uint8)).save(encoded, form)
    return encoded.getvalue()


def conversation(text: str, images: int = 1, **more: Any) -> bytes:
    asked = "\n".join(["<image>"] * images + [f"What about {text}?"])
    return json.dumps({"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": f"It is {text}."}], **more}).encode()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, shards: int, samples: int) -> Path:
    """`samples` conversations about a picture in each of `shards` shards; every fifth is a caption. Skills go in turn."""
    for shard in range(shards):
        files = {}
        for sample in range(samples):
            number = shard * samples + sample
            key = f"part/{number:05d}"
            files[f"{key}.png"] = picture(number)
            if number % 5 == 4:
                files[f"{key}.txt"] = f"A field of {number}.".encode()
            else:
                files[f"{key}.json"] = conversation(str(number), skill=["naming", "sums"][number % 2])
        write_shard(folder / f"part-{shard:03d}.tar", files)
    return folder
