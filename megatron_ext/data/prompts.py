"""Prompts to answer, skill by skill, wherever the data comes from: the procedural suite, or conversations in files. What is asked of either is the same."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_ext.batch import Prompt, Tiles
from megatron_ext.config.schema import DataConfig, VisionConfig
from megatron_ext.config.sizes import tokens_per_tile
from megatron_ext.data import suite
from megatron_ext.data.chat import encode_prompt
from megatron_ext.data.digits import Split
from megatron_ext.data.originals import reference
from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.sources import open_records, skills_in
from megatron_ext.errors import DataError


def skills_of(data: DataConfig) -> tuple[str, ...]:
    """The skills that prompts have: the suite's, or those that the conversations name (`"skill"`)."""
    return suite.ALL_SKILLS if data.kind == "suite" else skills_in(data)


def draw_skills(split: Split, count: int, seed: int, data: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, skills: Sequence[str] = ()) -> list[Prompt]:
    """`count` prompts of every skill (of `skills`, where given), skill by skill; of files fewer where a split holds fewer, and no conversation twice."""
    skills = skills or skills_of(data)
    if data.kind == "suite":
        return suite.draw_prompts(split, skills, count, seed, data, tokenizer, vision)
    prompts = []
    for skill in skills:
        prompts += draw_recorded_prompts(split, min(count, len(open_records(data, split, skill))), seed, data, tokenizer, vision, skill=skill)
    return prompts


def draw_recorded_prompts(
    split: Split, count: int, seed: int, config: DataConfig, tokenizer: Tokenizer, vision: VisionConfig, start: int = 0, skill: str = ""
) -> list[Prompt]:
    """Prompts `start` to `start + count` of the split (of one skill, where given) in its shuffled order, epoch after epoch: each asks the last question of a
    record, with the turns before it as history; the gold answer is the record's own last answer.

    Raises DataError for unreadable images and for a prompt longer than `data.max_length`.
    """
    records = open_records(config, split, skill)
    prompts = []
    for position in range(start, start + count):
        record = records[records.place(position, seed)]
        (*history, (question, answer)) = record.turns
        images = record.load(config, vision)
        tokens_S = encode_prompt(question, tokenizer, tokens_per_tile(vision), history, [len(tiles) for tiles in images])
        if len(tokens_S) > config.max_length:
            problem = f"the prompt has {len(tokens_S)} tokens, more than data.max_length = {config.max_length}"
            raise DataError(record.where, problem, "raise data.max_length or shorten it")
        meta = {"skill": record.skill, "template": config.kind, "where": record.where, "answer": answer, "pictures": [reference(one) for one in record.images]}
        key = "/".join(filter(None, (config.kind, split, skill, str(seed), str(position))))
        prompts.append(Prompt(key, record.skill, tokens_S, Tiles.join(images), answer, meta))
    return prompts


def num_prompts(split: Split, count: int, data: DataConfig) -> int:
    """How many `draw_skills` draws, without drawing them."""
    if data.kind == "suite":
        return count * len(skills_of(data))
    return sum(min(count, len(open_records(data, split, skill))) for skill in skills_of(data))


def chance_of(skill: str, data: DataConfig) -> float | None:
    """Accuracy without seeing the image; of files nobody knows."""
    return suite.chance(skill, data) if data.kind == "suite" else None
