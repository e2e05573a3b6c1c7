"""Sources blended by InternVL's meta file: how much of each, in which order."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.blend import BlendRecords, blend_records, read_meta
from megatron_ext.data.prompts import draw_skills, skills_of
from megatron_ext.data.records import Listed, Record
from megatron_ext.data.sources import open_records
from megatron_ext.data.stream import TrainingStream
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from tests.support.shards import conversation, write_shards


def listed(name: str, count: int) -> Listed:
    return Listed([Record(f"{name}:{number}", name, (), (), (("a", "b"),)) for number in range(count)])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 100))
def test_an_epoch_draws_as_often_from_each_source_as_it_should_and_a_source_shows_all_before_it_repeats_any(
    sizes: list[tuple[int, int]], epoch: int, seed: int
) -> None:
    blend = BlendRecords([listed(str(number), length) for number, (length, _) in enumerate(sizes)], [draws for _, draws in sizes])
    drawn = [blend[blend.place(position, seed)] for position in range((epoch + 1) * len(blend))]
    last = Counter(record.skill for record in drawn[epoch * len(blend) :])
    assert last == {str(number): draws for number, (_, draws) in enumerate(sizes)}
    for number, (length, _) in enumerate(sizes):
        times = Counter(record.where for record in drawn if record.skill == str(number)).values()
        assert max(times) - (min(times) if len(times) == length else 0) <= 1


@pytest.fixture
def meta(tmp_path: Path) -> Path:
    """200 lines whose images lie apart, taken twice; 60 samples of shards, half of them an epoch."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32), (250, 10, 10)).save(tmp_path / "images" / "a.png")
    lines = [conversation(str(number), image="a.png").decode() for number in range(200)]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    write_shards(tmp_path / "shards", 2, 30)
    return write(
        tmp_path,
        {
            "charts": {"root": "images", "annotation": "lines.jsonl", "repeat_time": 2, "data_augment": False, "length": 200},
            "shards": {"annotation": "shards/part-{000..001}.tar", "repeat_time": 0.5},
        },
    )


def write(folder: Path, entries: Any) -> Path:
    path = folder / "meta.json"
    path.write_text(json.dumps(entries))
    return path


def test_sources_are_blended_by_repeat_time_and_lend_their_names_to_lines_without_a_skill(meta: Path, tokenizer: Tokenizer) -> None:
    data = DataConfig(kind="blend", path=meta)
    records = open_records(data, "train")
    once = {name: len(blend_records(meta, None, "train", name)) for name in ("charts", "naming", "sums", "shards")}
    assert once["charts"] > 160 and sum(once.values()) - once["charts"] > 40
    drawn = [records[records.place(position, 0)] for position in range(len(records))]
    lines = [record for record in drawn if ".jsonl:" in record.where]
    assert len(lines) == 2 * once["charts"] and set(Counter(record.where for record in lines).values()) == {2}
    assert len(drawn) - len(lines) == round((sum(once.values()) - once["charts"]) / 2)
    assert skills_of(data) == ("charts", "naming", "shards", "sums")
    prompts = draw_skills("train", 200, 0, data, tokenizer, VisionConfig())
    assert Counter(prompt.skill for prompt in prompts) == once, "every conversation once, whatever its repeat_time"
    batch = TrainingStream(data, VisionConfig(), tokenizer, split="train", mix={"qa": 1.0}, seed=0).batch(0, 8)
    assert len(batch.tiles) == 8


GOOD = {"annotation": "lines.jsonl"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "is no object with sources"),
        ({}, "is no object with sources"),
        ({"a": {}}, r'meta\.json:a: has no "annotation"'),
        ({"a": GOOD | {"repeat_tmie": 2}}, "'repeat_tmie' is not known here; use annotation, root, repeat_time"),
        ({"a": GOOD | {"data_augment": True}}, '"data_augment" is true'),
        ({"a": GOOD | {"repeat_time": 0}}, '"repeat_time" is 0'),
        ({"a": {"annotation": "nowhere.jsonl"}}, r"meta\.json:a: there is no file .*nowhere\.jsonl"),
        ({"a": {"annotation": "nowhere"}}, "1 of 1 shards are missing"),
    ],
)
def test_what_is_wrong_with_a_source_is_said_with_its_name(meta: Path, entries: Any, message: str) -> None:
    path = write(meta.parent / "images", entries) if entries == [] else write(meta.parent, entries)
    read_meta.cache_clear()
    with pytest.raises(DataError, match=message):
        blend_records(path, None, "train")


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path: there is no file"):
        read_meta(tmp_path / "nowhere.json")
    (tmp_path / "meta.json").write_text("{broken")
    with pytest.raises(DataError, match=r"meta\.json: is not JSON"):
        read_meta(tmp_path / "meta.json")
