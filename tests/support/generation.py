"""What a rank of a generating replica does, for tests of layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from megatron_ext.batch import NO_TILES, FailedRollout, Rollout, route_digest
from megatron_ext.config.schema import ParallelConfig, RolloutConfig, RunConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.looks import Look, look
from megatron_ext.inference.passes import prompt_inputs
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.inference.trace import trace_answer
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.observe.trace import AnswerTrace
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.rl.hosts.ranks import LOOPBACK, Place
from megatron_ext.rl.roles import Ask
from megatron_ext.rl.rollout_worker import RolloutRank
from tests.support.models import IMAGE, Pieces, Words, open_gates, small_config, small_prompts

MASKED = ((0, 3), (2, 1))
Answers = dict[tuple[str, int], tuple[list[int], list[float], str]]


def answers_of_a_rank(rank: int, world_size: int, init_method: str, parallel: ParallelConfig) -> tuple[Answers, AnswerTrace, dict[str, Look]]:
    """{(prompt, sample): (tokens, log-probs, route digest)} of this data-parallel rank's prompts, and under "masked" of those answered without two experts; the
    trace of the first of them; and by prompt, where taps look, one prompt at a time. The last rank of two has fewer chunks than the first, and fewer pictures.
    Several ranks read prompts in parts, one rank reads them at once."""
    with open_parallel(parallel, rank, world_size, init_method, seed=0) as context:
        model = build_model(small_config(init_std=0.3), IMAGE, context, seed=5)
        open_gates(model)
        store_for_generation(model)
        engine = Engine(model, context, Words(), RolloutConfig(max_new_tokens=8, batch_size=6, prefill_tokens=16384 if world_size == 1 else 4))
        prompts = small_prompts(5)
        mine = prompts if context.layout.dp == 1 else (prompts[:4] if context.dp_rank == 0 else prompts[4:])

        def seeds(index: int, sample: int) -> int:
            return rollout_seed(0, 0, mine[index].key, sample)

        rollouts = engine.generate(mine, 3, seeds=seeds, version=0)
        with model.router_tap.mask(MASKED):
            masked = engine.generate(mine, 1, seeds=seeds, version=0)
        for rollout in masked:
            assert not any((rollout.routes.experts_SLK[:, layer] == expert).any() for layer, expert in MASKED)
        answers = _by_key(rollouts) | {(f"masked {key}", sample): answer for (key, sample), answer in _by_key(masked).items()}
        seen, no = [prompt for prompt in mine if len(prompt.tiles)], [False] * len(mine)
        with mock.patch("megatron_ext.inference.looks.AT_ONCE", 1):
            looks = look(engine, seen, no, no, 16)
        return answers, trace_answer(engine, Pieces(), rollouts[0], Path("x"), {}), {prompt.key: one for prompt, one in zip(seen, looks, strict=True)}


def logprobs_of_a_full_pass(engine: Engine, rollout: Rollout) -> np.ndarray:
    """Of the answer's tokens [T], by one pass over prompt and answer without a cache."""
    start, tokens_S = len(rollout.prompt.tokens_S), np.concatenate([rollout.prompt.tokens_S, rollout.response_T])
    inputs, _ = prompt_inputs([replace(rollout.prompt, tokens_S=tokens_S)], engine.passes.vocabulary.eos_id, 1, engine.context.device)
    with torch.no_grad():
        logprobs_SV = engine.model.eval()(inputs)[:, 0].masked_fill(engine.passes.banned_V, float("-inf")).log_softmax(-1)
    return logprobs_SV[np.arange(start - 1, len(tokens_S) - 1), rollout.response_T].numpy()


def _by_key(rollouts: Sequence[Rollout]) -> Answers:
    return {(r.prompt.key, r.sample): (r.response_T.tolist(), r.logprobs_T.tolist(), route_digest(r.routes.experts_SLK)) for r in rollouts}


def slices_of_a_rank(
    rank: int, world_size: int, init_method: str, config: RunConfig, layouts: Sequence[ParallelConfig]
) -> list[tuple[Answers, Answers, list[str]]]:
    """For each layout what a rollout worker says: in one call; in slices of three steps; and why it does not answer a prompt that is too long, asked with the
    others. With two lanes the second has nothing to do at first; it is asked after four slices, and then the first runs out of work."""
    found = []
    for number, parallel in enumerate(layouts):
        worker = RolloutRank()
        shaped = config.model_copy(update={"rollout": config.rollout.model_copy(update={"parallel": parallel})})
        lane = worker.open(shaped, Place(rank, world_size, f"{init_method}.{number}", LOOPBACK))
        prompts = [replace(prompt, tiles=NO_TILES, tokens_S=prompt.tokens_S[prompt.tokens_S != IMAGE]) for prompt in small_prompts(8)]
        long = replace(prompts[0], key="long", tokens_S=np.full(config.model.max_positions, 9, np.int32))
        first, later = (prompts[:4], prompts[4:]) if lane.dp_size == 1 else ((prompts[:4], []) if lane.dp_rank == 0 else ([], prompts[4:]))
        whole = worker.advance([Ask(prompt, (0, 1), 1) for prompt in [*first, *later]], math.inf)
        asks = [Ask(prompt, (0, 1), 1) for prompt in [*first, long]]
        sliced, slices = worker.advance(asks, 3), 1
        while not worker._session.idle:
            sliced += worker.advance([Ask(prompt, (0, 1), 1) for prompt in later] if slices == 4 else [], 3)
            slices += 1
        assert lane.speaks or not (whole or sliced)
        failed = [f"{answer.prompt.key}#{answer.sample} {answer.reason}" for answer in sliced if isinstance(answer, FailedRollout)]
        found.append((_by_key(whole), _by_key([answer for answer in sliced if isinstance(answer, Rollout)]), failed))
        worker._world.close()
    return found
