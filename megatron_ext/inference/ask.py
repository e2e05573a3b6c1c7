"""One prompt, answered: what a person types to see what a checkpoint says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_ext.batch import Prompt, Rollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.device import session
from megatron_ext.inference.replica import load_engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks

TIMEOUT_S = 600.0
MOST_LIKELY = -1
"""The `sample` number of the greedy answer."""


def answers(config: RunConfig, checkpoint: Path, prompt: Prompt, samples: int) -> list[Rollout]:
    """The most likely answer, then `samples` sampled ones. Starts the ranks of one rollout replica. Raises CheckpointError for a checkpoint that does
    not fit."""
    parallel = config.rollout.parallel
    found = run_ranks(answer_rank, parallel.num_ranks, config, checkpoint, prompt, samples, timeout_s=TIMEOUT_S, threads_per_rank=parallel.threads_per_rank)
    rollouts: list[Rollout] = found[0]
    return rollouts


def answer_rank(rank: int, world_size: int, init_method: str, config: RunConfig, checkpoint: Path, prompt: Prompt, samples: int) -> list[Rollout]:
    """Every rank of the replica takes part; the first one's answers are returned."""
    with session(), open_parallel(config.rollout.parallel, rank, world_size, init_method, config.seed) as context:
        engine, _ = load_engine(config, checkpoint, context)

        def seeds(_: int, sample: int) -> int:
            return rollout_seed("generate", config.seed, sample)

        likely = [replace(rollout, sample=MOST_LIKELY) for rollout in engine.generate([prompt], 1, seeds=seeds, version=0, greedy=True)]
        return likely + (engine.generate([prompt], samples, seeds=seeds, version=0) if samples else [])
