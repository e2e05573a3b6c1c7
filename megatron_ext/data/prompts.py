"""Prompts to answer, skill by skill, wherever the data comes from: the procedural suite, or conversations in a file. What is asked of either is the same."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.batch import Prompt
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data import suite
from megatron_ext.data.digits import Split
from megatron_ext.data.jsonl import draw_jsonl_prompts, read_split, skills_in
from megatron_ext.data.pieces import Tokenizer


def skills_of(data: DataConfig) -> tuple[str, ...]:
    """The skills that prompts have: the suite's, or those that the lines of the file name (`"skill"`)."""
    if data.kind == "suite":
        return suite.ALL_SKILLS
    return skills_in(data.path)


def draw_skills(split: Split, count: int, seed: int, data: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, skills: Sequence[str] = ()) -> list[Prompt]:
    """`count` prompts of every skill (of `skills`, where given), skill by skill; of a file fewer where a split holds fewer, and no line twice."""
    skills = skills or skills_of(data)
    if data.kind == "suite":
        return suite.draw_prompts(split, skills, count, seed, data, tokenizer, vision)
    prompts = []
    for skill in skills:
        prompts += draw_jsonl_prompts(split, min(count, len(read_split(data.path, split, skill))), seed, data, tokenizer, vision, skill=skill)
    return prompts


def num_prompts(split: Split, count: int, data: DataConfig) -> int:
    """How many `draw_skills` draws, without drawing them."""
    if data.kind == "suite":
        return count * len(skills_of(data))
    return sum(min(count, len(read_split(data.path, split, skill))) for skill in skills_of(data))


def chance_of(skill: str, data: DataConfig) -> float | None:
    """Accuracy without seeing the image; of a file nobody knows."""
    return suite.chance(skill, data) if data.kind == "suite" else None
