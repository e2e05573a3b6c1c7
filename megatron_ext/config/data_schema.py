"""The section `data`: what a run learns from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_ext.config.section import Section


class DataConfig(Section):
    kind: Literal["suite", "jsonl", "webdataset", "blend"] = "suite"
    """`suite`: the procedural skill suite, drawn as it is read. `jsonl`: one conversation with images a line. `webdataset`: tar shards of samples. `blend`:
    several of the last two."""
    path: Path | None = None
    """`jsonl`: the file; images are relative to its folder. `webdataset`: a folder of shards, or a pattern such as shards/part-{000000..000031}.tar. `blend`:
    InternVL's meta file, {"name": {"annotation": ..., "root": ..., "repeat_time": 1}}."""
    index: Path | None = None
    """With shards: the folder that keeps where their samples are, which several runs may share. Unset: `shards` in the run's folder."""
    image_size: int = Field(32, gt=0)
    image_processing: Literal["fit", "internvl"] = "fit"
    """Of pictures in files. `fit`: one tile, letterboxed. `internvl`: dynamic tiling with a thumbnail, as transformers does it for InternVL."""
    max_tiles: int = Field(12, gt=0)
    """With `internvl`: tiles per picture, the thumbnail not counted."""
    image_root: Path | None = None
    """With `jsonl`: the folder that images are relative to and must lie in, links followed. Unset: the file's own."""
    max_image_bytes: int = Field(64 << 20, gt=0)
    max_image_pixels: int = Field(64_000_000, gt=0, le=178_956_970)
    """A picture of more bytes, or of more pixels than this, is not decoded: a small file may say that it is enormous. A pixel takes up to 4 bytes while it is
    scaled; Pillow itself opens none beyond 178956970."""
    tokenizer: Path | None = None
    """A Hugging Face folder whose tokenizer is used as it is (start from a converted checkpoint with its own); unset: one is trained on the run's text."""
    level: int = Field(0, ge=0)
    """Difficulty of the suite's scenes."""
    questions_per_image: int = Field(6, gt=0)
    """Question-answer turns packed into one training conversation."""
    vocab_size: int = Field(256, gt=0)
    """Size asked of SentencePiece."""
    real_digits: float = Field(0.25, ge=0, le=1)
    """Share of OCR scenes drawn from scikit-learn's handwritten digits."""
    max_length: int = Field(256, gt=0)
    """Tokens a row may hold; a longer conversation is an error that names it."""
    max_bad_samples: int = Field(0, ge=0)
    """Conversations that training may leave out, on each rank, because an image (of shards, anything of the sample) cannot be read: the next one is taken, and
    the one left out is named and counted (`data/bad_samples`)."""
