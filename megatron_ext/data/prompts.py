"""Prompts to answer, wherever the data comes from: the procedural suite, or conversations in a file. What is asked of either is the same.

draw_skills   a number of prompts of every skill: evaluation, discovery, validation
draw_any      prompts as they come, epoch after epoch: reinforcement learning on a file
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.batch import Prompt
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.data import suite
from megatron_ext.data.digits import Split
from megatron_ext.data.jsonl import draw_jsonl_prompts, read_jsonl, read_split
from megatron_ext.data.pieces import Tokenizer


def skills_of(data: DataConfig) -> tuple[str, ...]:
    """The skills that prompts have: the suite's, or those that the lines of the file name (`"skill"`)."""
    if data.kind == "suite":
        return suite.ALL_SKILLS
    return tuple(sorted({record.skill for record in read_jsonl(data.path)}))


def draw_skills(split: Split, count: int, seed: int, data: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, skills: Sequence[str] = ()) -> list[Prompt]:
    """`count` prompts of every skill (of `skills`, where given), skill by skill; of a file fewer where a split holds fewer, and no line twice."""
    skills = skills or skills_of(data)
    if data.kind == "suite":
        return suite.draw_prompts(split, skills, count, seed, data, tokenizer, vision)
    prompts = []
    for skill in skills:
        held = sum(record.skill == skill for record in read_split(data.path, split))
        prompts += draw_jsonl_prompts(split, min(count, held), seed, data, tokenizer, vision, skill=skill)
    return prompts


def draw_any(split: Split, count: int, seed: int, data: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, start: int) -> list[Prompt]:
    """Prompts `start` to `start + count` of a file, skills as they come."""
    return draw_jsonl_prompts(split, count, seed, data, tokenizer, vision, start)


def chance_of(skill: str, data: DataConfig) -> float | None:
    """Accuracy without seeing the image; of a file nobody knows."""
    return suite.chance(skill, data) if data.kind == "suite" else None
