"""What RL asks: the prompts of every draw, and of every validation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np

from megatron_ext.batch import Prompt, Rollout
from megatron_ext.batch.images import ImageStore, stored
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.prompts import draw_recorded_prompts, draw_skills
from megatron_ext.data.rewards import correctness
from megatron_ext.data.suite import ALL_SKILLS, SKILLS, draw_prompts
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.rl.fleet import MegatronFleet
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.sampling import keep_all, keep_differing
from megatron_ext.rl.stream import Questions
from megatron_ext.training.read_ahead import read_ahead

VALIDATION_SEED = 1


@contextmanager
def questions(config: RunConfig, tokenizer: Tokenizer, images: ImageStore) -> Iterator[Questions]:
    """Their images travel as references into the store. While a step is at work, a thread draws the next one's, and stores their images."""
    rl = config.rl
    choose = partial(keep_differing, wanted=rl.prompts_per_step) if rl.dynamic_sampling else keep_all
    with read_ahead(lambda number: stored(prompts_of_step(number, config, tokenizer), images), rl.steps) as draw:
        yield Questions(rl.steps, rl.rollouts_per_prompt, draw, choose, max(1, rl.dynamic_sampling))


def prompts_of_step(step: int, config: RunConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a step, a function of (seed, step); from `rl.steps` on, those that dynamic sampling asks besides. Of the suite: skills by `rl.mix` (`qa`
    shared equally by the single skills), never the same prompt in two steps. Of files: their train split, in an order of its own each epoch."""
    start = step * config.rl.prompts_per_step
    if config.data.kind != "suite":
        return draw_recorded_prompts("train", config.rl.prompts_per_step, config.seed, config.data, tokenizer, config.model.vision, start)
    prompts = []
    for skill, count in skill_counts(step, config).items():
        prompts += draw_prompts("train", [skill], count, config.seed, config.data, tokenizer, config.model.vision, start)
    order = np.random.default_rng(rollout_seed(config.seed, "order", step)).permutation(len(prompts))
    return [prompts[index] for index in order]


def skill_counts(step: int, config: RunConfig) -> dict[str, int]:
    """How many prompts of each skill: they sum to `prompts_per_step`, and over steps each skill gets its share exactly on average (systematic sampling)."""
    qa, composite = config.rl.mix.get("qa", 0.0), config.rl.mix.get("composite", 0.0)
    weights = np.array([qa / len(SKILLS)] * len(SKILLS) + [composite])
    edges = np.concatenate([[0.0], np.cumsum(weights / weights.sum())]) * config.rl.prompts_per_step
    offset = np.random.default_rng(rollout_seed(config.seed, "mix", step)).random()
    counts = np.diff(np.floor(edges + offset + 1e-9)).astype(int)
    return dict(zip(ALL_SKILLS, counts.tolist(), strict=True))


def validate(finished: int, config: RunConfig, fleet: MegatronFleet, tokenizer: Tokenizer) -> Metrics:
    """`val/val/<skill>/accuracy`: greedy answers on the validation split, every `eval_every` steps."""
    every = config.rl.eval_every
    if not every or finished % every:
        return {}
    prompts = draw_skills("val", config.evaluate.prompts_per_skill, VALIDATION_SEED, config.data, tokenizer, config.model.vision)
    correct = correctness(config.rl.reward, config.earl.correct_threshold)
    verdicts: dict[str, list[bool]] = {}
    for answer in fleet.generate(prompts, 1, finished, greedy=True):
        right = isinstance(answer, Rollout) and correct(answer.prompt, answer.text)
        verdicts.setdefault(answer.prompt.skill, []).append(right)
    return {f"val/val/{skill}/accuracy": sum(right) / len(right) for skill, right in verdicts.items()}
