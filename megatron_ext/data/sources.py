"""Where conversations come from, by `data.kind`: what a stage asks is the same of every kind that is read from files."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.blend import blend_records, read_meta
from megatron_ext.data.digits import Split
from megatron_ext.data.jsonl import known, read_split
from megatron_ext.data.records import Listed, Records
from megatron_ext.data.shard_index import open_index
from megatron_ext.data.webdataset import ShardRecords
from megatron_ext.errors import DataError


@lru_cache(maxsize=64)
def open_records(data: DataConfig, split: Split, skill: str = "") -> Records:
    """The conversations of a split: of one skill, where given, if there are any. Raises DataError where the split has none."""
    if data.kind == "jsonl":
        return Listed(read_split(data.path, split, skill, data.image_root))
    records = _records(data, split, skill)
    if not skill and not len(records):
        raise DataError(str(data.path), f"none of its conversations falls into the {split} split", "add conversations; about 40 are needed")
    return records


def skills_in(data: DataConfig) -> tuple[str, ...]:
    """Every skill that a conversation names, in alphabetical order."""
    if data.kind == "jsonl":
        found = {record.skill for record in known(data.path, data.image_root)}
    elif data.kind == "webdataset":
        found = set(open_index(data.path, data.index).skills)
    else:
        found = {skill for source in read_meta(data.path) for skill in source.skills(data.index)}
    return tuple(sorted(found))


def all_texts(data: DataConfig) -> Iterator[str]:
    """Both sides of every turn, of all splits. Samples of shards that cannot be read are passed over: training names them."""
    records = Listed(known(data.path, data.image_root)) if data.kind == "jsonl" else _records(data, None, "")
    for number in range(len(records)):
        try:
            turns = records[number].turns
        except DataError:
            continue
        for turn in turns:
            yield from turn


def _records(data: DataConfig, split: Split | None, skill: str) -> Records:
    if data.kind == "webdataset":
        return ShardRecords(open_index(data.path, data.index), split, skill)
    return blend_records(data.path, data.index, split, skill)
