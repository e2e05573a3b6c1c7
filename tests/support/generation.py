"""What a rank of a generating replica does, for tests of layouts."""

from __future__ import annotations

from megatron_ext.batch import route_digest
from megatron_ext.config.schema import ParallelConfig, RolloutConfig
from megatron_ext.inference.engine import Engine
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.model.assembly import build_model
from megatron_ext.model.weight_storage import store_for_generation
from megatron_ext.parallel.groups import open_parallel
from tests.support.models import IMAGE, Words, open_gates, small_config, small_prompts

Answers = dict[tuple[str, int], tuple[list[int], list[float], str]]


def answers_of_a_rank(rank: int, world_size: int, init_method: str, parallel: ParallelConfig) -> Answers:
    """{(prompt, sample): (tokens, log-probs, route digest)} of this data-parallel rank's prompts; the last rank of two has fewer chunks than the first.
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
        return {(r.prompt.key, r.sample): (r.response_T.tolist(), r.logprobs_T.tolist(), route_digest(r.routes.experts_SLK)) for r in rollouts}
