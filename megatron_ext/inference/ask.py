"""One prompt, answered: what a person types to see what a checkpoint says, and, with traces, where it looked and through which experts it went."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from megatron_ext.batch import Prompt, Rollout
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.rewards import correctness
from megatron_ext.device import session
from megatron_ext.inference.replica import load_engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.inference.trace import Clusters, trace_answer
from megatron_ext.observe.trace import AnswerTrace
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.parallel.local import run_ranks

TIMEOUT_S = 600.0
MOST_LIKELY = -1
"""The `sample` number of the greedy answer."""
Answers = tuple[list[Rollout], list[AnswerTrace]]


def answers(config: RunConfig, checkpoint: Path, prompt: Prompt, samples: int, clusters: Clusters | None = None) -> Answers:
    """The most likely answer, then `samples` sampled ones; with `clusters` (none will do) a trace of each too. Starts the ranks of one rollout replica. Raises
    CheckpointError for a checkpoint that does not fit."""
    parallel = config.rollout.parallel
    asked = config, checkpoint, prompt, samples, clusters
    found: Answers = run_ranks(answer_rank, parallel.num_ranks, *asked, timeout_s=TIMEOUT_S, threads_per_rank=parallel.threads_per_rank)[0]
    return found


def answer_rank(
    rank: int, world_size: int, init_method: str, config: RunConfig, checkpoint: Path, prompt: Prompt, samples: int, clusters: Clusters | None
) -> Answers:
    """Every rank of the replica takes part; the first one's answers are returned."""
    with session(), open_parallel(config.rollout.parallel, rank, world_size, init_method, config.seed) as context:
        engine, tokenizer = load_engine(config, checkpoint, context)

        def seeds(_: int, sample: int) -> int:
            return rollout_seed("generate", config.seed, sample)

        rollouts = [replace(rollout, sample=MOST_LIKELY) for rollout in engine.generate([prompt], 1, seeds=seeds, version=0, greedy=True)]
        rollouts += engine.generate([prompt], samples, seeds=seeds, version=0) if samples else []
        if clusters is None:
            return rollouts, []
        right = correctness(config.rl.reward, config.earl.correct_threshold) if prompt.answer else None
        verdicts = [None if right is None else right(prompt, rollout.text) for rollout in rollouts]
        return rollouts, [trace_answer(engine, tokenizer, rollout, checkpoint, clusters, verdict) for rollout, verdict in zip(rollouts, verdicts, strict=True)]
