"""Conversations from a JSONL file in the format of InternVL and LLaVA, one object a line:

    {"image": "cats/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]}

`image` is a path or a list of paths, relative to the file's folder; without it the conversation is text only. `width` and `height` (numbers, or lists for
several images) are checked against the pictures when given; `skill` groups accuracies. Everything wrong with a line is reported as `file:line`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_ext.batch import Prompt, Tiles
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data.chat import Turn, check_placeholders, encode_prompt
from megatron_ext.data.digits import Split
from megatron_ext.data.images import load_tiles
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.suite.scene import split_of_text
from megatron_ext.errors import DataError


@dataclass(frozen=True)
class Record:
    """One line: its images (paths and, where given, claimed sizes) and turns. Pixels are read by `load`."""

    where: str  # file:line
    skill: str
    images: tuple[Path, ...]
    sizes: tuple[tuple[int, int] | None, ...]
    turns: tuple[Turn, ...]
    split: Split

    def load(self, config: DataConfig, vision: VisionConfig) -> tuple[Tiles, ...]:
        """The tiles of each image. Raises DataError naming the line and the file, also where the model sees no images."""
        if self.images and not vision.enabled:
            raise DataError(self.where, f"shows {self.images[0].name} to a model without vision (model.vision.enabled = false)", "use conversations of text")
        try:
            return tuple(load_tiles(path, config, size) for path, size in zip(self.images, self.sizes, strict=True))
        except DataError as error:
            raise DataError(f"{self.where}: {error.where}", error.problem, error.remedy) from error


def read_jsonl(path: Path | None) -> list[Record]:
    """Every record of the file; blank lines are skipped. Raises DataError, as `file:line` where a line is at fault."""
    if path is None:
        raise DataError("data.path", "is not set, but data.kind is jsonl", "name the JSONL file")
    if not path.is_file():
        raise DataError("data.path", f"there is no file {path}", "name the JSONL file")
    records = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                records.append(_record(line, f"{path}:{number}", path.parent))
    if not records:
        raise DataError(str(path), "holds no conversation", "write one JSON object a line")
    return records


@lru_cache(maxsize=2)
def _known(path: Path | None) -> tuple[Record, ...]:
    """The file is read once, whatever is asked of it."""
    return tuple(read_jsonl(path))


def skills_in(path: Path | None) -> tuple[str, ...]:
    """Every skill that a line names, in alphabetical order."""
    return tuple(sorted({record.skill for record in _known(path)}))


@lru_cache(maxsize=64)
def read_split(path: Path | None, split: Split, skill: str = "") -> tuple[Record, ...]:
    """The records of one split (of one skill, where given, if it has any): 90 % train, 5 % val, 5 % test by the hash of a record's text and image names.
    Raises DataError when there are none in the split."""
    if skill:
        return tuple(record for record in read_split(path, split) if record.skill == skill)
    records = _known(path)
    chosen = tuple(record for record in records if record.split == split)
    if not chosen:
        raise DataError(str(path), f"none of its {len(records)} conversations falls into the {split} split", "add conversations; about 40 are needed")
    return chosen


def draw_jsonl_prompts(
    split: Split, count: int, seed: int, config: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, start: int = 0, skill: str = ""
) -> list[Prompt]:
    """Prompts `start` to `start + count` of the split (of one skill, where given) in its shuffled order, epoch after epoch: each asks the last question of a
    record, with the turns before it as history; the gold answer is the record's own last answer.

    Raises DataError for unreadable images and for a prompt longer than `data.max_length`.
    """
    records = read_split(config.path, split, skill)
    prompts = []
    for index in range(start, start + count):
        record = records[shuffled(index, len(records), seed)]
        (*history, (question, answer)) = record.turns
        images = record.load(config, vision)
        tokens_S = encode_prompt(question, tokenizer, tokens_per_tile(vision), history, [len(tiles) for tiles in images])
        if len(tokens_S) > config.max_length:
            problem = f"the prompt has {len(tokens_S)} tokens, more than data.max_length = {config.max_length}"
            raise DataError(record.where, problem, "raise data.max_length or shorten it")
        meta = {"skill": record.skill, "template": "jsonl", "where": record.where, "answer": answer}
        key = "/".join(filter(None, ("jsonl", split, skill, str(seed), str(index))))
        prompts.append(Prompt(key, record.skill, tokens_S, Tiles.join(images), answer, meta))
    return prompts


def shuffled(index: int, length: int, seed: int) -> int:
    """Position `index` of an endless shuffle: every epoch visits each of `length` records once, in an order of its own."""
    epoch, position = divmod(index, length)
    return int(_order(epoch, length, seed)[position])


@lru_cache(maxsize=4)
def _order(epoch: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(length)


def _record(line: bytes, where: str, folder: Path) -> Record:
    try:
        entry = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise DataError(where, f"is not JSON ({error})", "write one JSON object a line") from error
    if not isinstance(entry, dict):
        raise DataError(where, f"holds a {type(entry).__name__}, not an object", 'start the line with {"image": ...')
    turns = _turns(entry, where)
    names = entry.get("image", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(where, f'"image" is {names!r}', "write a path or a list of paths")
    check_placeholders(turns, len(names), where)
    images = tuple(folder / name for name in names)
    for image in images:
        if not image.is_file():
            raise DataError(where, f"there is no image {image}", "images are relative to the folder of the JSONL file")
    skill = entry.get("skill", "jsonl")
    if not isinstance(skill, str):
        raise DataError(where, f'"skill" is {skill!r}', "write a word")
    split = split_of_text(json.dumps([names, turns]))
    return Record(where, skill, images, _sizes(entry, len(images), where), turns, split)


def _turns(entry: dict[str, object], where: str) -> tuple[Turn, ...]:
    """Question and answer pairs. Raises DataError unless human and gpt alternate, human first."""
    messages = entry.get("conversations")
    if not isinstance(messages, list) or not messages:
        problem = "has no field" if "conversations" not in entry else "has an empty or malformed field"
        raise DataError(where, f'{problem} "conversations"', 'write [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]')
    values = []
    for position, message in enumerate(messages):
        speaker = "human" if position % 2 == 0 else "gpt"
        if not isinstance(message, dict) or message.get("from") != speaker or not isinstance(message.get("value"), str):
            raise DataError(where, f"message {position + 1} is not a text from {speaker!r}", "human and gpt take turns, human first")
        values.append(message["value"])
    if len(values) % 2:
        raise DataError(where, f"its {len(values)} messages end with a question", "end with an answer from gpt")
    return tuple(zip(values[::2], values[1::2], strict=True))


def _sizes(entry: dict[str, object], num_images: int, where: str) -> tuple[tuple[int, int] | None, ...]:
    """The claimed (width, height) of every image, or None where nothing is claimed."""
    sides = [entry.get(name) for name in ("width", "height")]
    if sides == [None, None]:
        return (None,) * num_images
    widths, heights = (side if isinstance(side, list) else [side] for side in sides)
    if not len(widths) == len(heights) == num_images or not all(isinstance(side, int) for side in widths + heights):
        raise DataError(where, f'"width" and "height" do not give {num_images} sizes', "write two numbers, or two lists with one number per image")
    return tuple(zip(widths, heights, strict=True))
