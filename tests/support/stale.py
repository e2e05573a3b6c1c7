"""A learner's rank that updates once on rollouts of older weights. In a module of its own, because ranks import it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_ext.batch import ScoredRollout
from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.device import session
from megatron_ext.inference.replica import load_engine
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.plan import Layout
from megatron_ext.rl.hosts.ranks import LOOPBACK, Place
from megatron_ext.rl.learner import LearnerRank
from megatron_ext.rl.parcels import plan_parcels
from tests.support.models import IMAGE, small_prompts


def answers_and_update(
    rank: int, world_size: int, init_method: str, config: RunConfig, folder: Path, checkpoint: Path
) -> tuple[list[ScoredRollout], dict[str, float]]:
    """And what one rank that learns from the answers says of its update."""
    scored = answers(rank, world_size, f"{init_method}.answers", config, checkpoint)
    return scored, update(rank, world_size, f"{init_method}.update", config, ParallelConfig(), folder, checkpoint, scored)


def answers(rank: int, world_size: int, init_method: str, config: RunConfig, checkpoint: Path) -> list[ScoredRollout]:
    """Four prompts, three answers each, of the checkpoint's weights. Those of the first two prompts say that they are of weights one step older, as far as
    their first tokens go, and have log-probs as such might have had."""
    with session(), open_parallel(config.rollout.parallel, rank, world_size, init_method, config.seed) as context:
        engine, _ = load_engine(config, checkpoint, context)
        prompts = [replace(prompt, tokens_S=prompt.tokens_S[prompt.tokens_S != IMAGE], tiles=prompt.tiles[:0]) for prompt in small_prompts(4)]
        rollouts = engine.generate(prompts, 3, seeds=lambda number, sample: 10 * number + sample, version=1)
    rng = np.random.default_rng(0)
    for index, rollout in enumerate(rollouts[:6]):
        versions_T = 1 + np.minimum(np.arange(len(rollout.response_T)) - 3, 0).clip(-1).astype(np.int32)
        drift_T = rng.normal(0.05 * (index - 2), 0.2, len(versions_T)).astype(np.float32)
        rollouts[index] = replace(rollout, versions_T=versions_T, logprobs_T=rollout.logprobs_T + drift_T)
    return [ScoredRollout(rollout, 1.0, {}) for rollout in rollouts]


def update(
    rank: int, world_size: int, init_method: str, config: RunConfig, parallel: ParallelConfig, folder: Path, checkpoint: Path, scored: list[ScoredRollout]
) -> dict[str, float]:
    """What the rank says of its update, in two minibatches, which share the prompts out."""
    learner, shaped = LearnerRank(), config.model_copy(update={"parallel": parallel})
    place = learner.open(shaped, folder, checkpoint, Place(rank, world_size, init_method, LOOPBACK))
    learner._finished = 1  # as if it had learned before
    multiple = Layout.of(parallel).length_multiple
    advantages = np.linspace(-1, 1, len(scored))
    parcels = plan_parcels(scored, advantages, minibatches=2, dp_size=place.dp_size, multiple=multiple, pad_id=0)
    return learner.update(parcels[place.dp_rank]).metrics
