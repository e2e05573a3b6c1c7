"""Prompts of every skill, whether the suite draws them or a file holds them."""

from __future__ import annotations

import json

import pytest

from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data.jsonl import read_split
from megatron_ext.data.prompts import chance_of, draw_recorded_prompts, draw_skills, skills_of
from megatron_ext.data.suite import ALL_SKILLS, draw_prompts
from megatron_ext.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """200 conversations of text, every fourth about sums, the others about words."""
    path = tmp_path_factory.mktemp("file") / "mine.jsonl"
    lines = []
    for number in range(200):
        said = [{"from": "human", "value": f"what about {number} and 1?"}, {"from": "gpt", "value": str(number + 1)}]
        lines.append(json.dumps({"skill": "words" if number % 4 else "sums", "conversations": said}))
    path.write_text("\n".join(lines))
    return DataConfig(kind="jsonl", path=path)


def test_the_suites_prompts_are_the_suites(tokenizer: Tokenizer) -> None:
    data, vision = DataConfig(), VisionConfig()
    ours, theirs = draw_skills("val", 2, 5, data, tokenizer, vision), draw_prompts("val", ALL_SKILLS, 2, 5, data, tokenizer, vision)
    assert [prompt.key for prompt in ours] == [prompt.key for prompt in theirs]
    assert skills_of(data) == ALL_SKILLS and chance_of("compare", data) == 0.5


def test_every_skill_of_a_file_is_asked_and_no_line_twice(file: DataConfig, tokenizer: Tokenizer) -> None:
    assert skills_of(file) == ("sums", "words") and chance_of("sums", file) is None
    held = {skill: sum(record.skill == skill for record in read_split(file.path, "train")) for skill in ("sums", "words")}
    prompts = draw_skills("train", 60, 0, file, tokenizer, VisionConfig())
    assert [prompt.skill for prompt in prompts] == ["sums"] * min(60, held["sums"]) + ["words"] * 60
    assert len({prompt.meta["where"] for prompt in prompts}) == len({prompt.key for prompt in prompts}) == len(prompts)
    only = draw_skills("train", 3, 0, file, tokenizer, VisionConfig(), ["words"])
    assert [prompt.key for prompt in only] == [prompt.key for prompt in prompts if prompt.skill == "words"][:3]


def test_steps_go_through_the_train_split_once_an_epoch(file: DataConfig, tokenizer: Tokenizer) -> None:
    lines = {record.where for record in read_split(file.path, "train")}
    epoch = draw_recorded_prompts("train", len(lines), 0, file, tokenizer, VisionConfig(), start=0)
    assert {prompt.meta["where"] for prompt in epoch} == lines
    again = draw_recorded_prompts("train", 5, 0, file, tokenizer, VisionConfig(), start=7)
    assert [prompt.key for prompt in again] == [prompt.key for prompt in epoch[7:12]]
