"""A learner of any layout that is taught by routes, for tests that compare layouts: the same answers, with routes that were drawn up, in one optimizer step."""

from __future__ import annotations

import numpy as np

from megatron_ext.batch import Rollout, RouteTrace, ScoredRollout
from megatron_ext.config.schema import ClvrConfig, EarlConfig, OptimizerConfig, ParallelConfig, RLConfig, RolloutConfig, RunConfig
from megatron_ext.model.assembly import build_chunks
from megatron_ext.parallel.groups import open_parallel
from megatron_ext.rl.batching import microbatches, unpack
from megatron_ext.rl.goals import Clusters, Goals
from megatron_ext.rl.parcels import plan_parcels
from megatron_ext.rl.policy_step import Policy, policy_batch
from megatron_ext.rl.router_goals import RouterGoals
from megatron_ext.training.engines import start_engine
from megatron_ext.training.step import optimizer_step
from tests.support.models import IMAGE, USABLE, small_config, small_prompts

LAYERS, EXPERTS, TOPK = 4, 8, 2
MODEL = small_config(num_layers=LAYERS, moe_balancing="none", clvr=ClvrConfig(enabled=False, taps=()))
MODES = {
    "score": EarlConfig(),
    "pathwise": EarlConfig(mode="pathwise", pathwise_weight=100.0),
    "router_pg": EarlConfig(mode="router_pg", router_weight=5.0, router_kl=1.0),
}


def answers() -> list[ScoredRollout]:
    rng = np.random.default_rng(0)
    found = []
    for prompt in small_prompts(4):
        for sample in range(2):
            response_T = rng.integers(8, USABLE, size=int(rng.integers(2, 7))).astype(np.int32)
            rows = len(prompt.tokens_S) + len(response_T) - 1
            experts_SLK = rng.permuted(np.broadcast_to(np.arange(EXPERTS, dtype=np.uint8), (rows, LAYERS, EXPERTS)), axis=2)[:, :, :TOPK]
            trace = RouteTrace(experts_SLK, np.full(experts_SLK.shape, 1 / TOPK, np.float16))
            zeros_T = np.zeros(len(response_T), np.float32)
            found.append(ScoredRollout(Rollout(prompt, sample, 0, response_T, zeros_T, zeros_T.astype(np.int32), "stop", "", trace), 1.0, {}))
    return found


def goals(scored: list[ScoredRollout]) -> Goals:
    """Two skills with clusters in two layers each, of different stages; the last answer has no goal."""
    member_XLE = np.zeros((2, LAYERS, EXPERTS), dtype=bool)
    member_XLE[0, 0, [1, 2]] = member_XLE[0, 3, 5] = member_XLE[1, 1, 7] = member_XLE[1, 2, [0, 3]] = True
    of_rollouts = [np.resize(np.array([1, 2, 2], np.int16), len(answer.rollout.response_T)) * (index < len(scored) - 1) for index, answer in enumerate(scored)]
    return Goals(Clusters(("ocr", "count"), member_XLE), of_rollouts)


def taught(rank: int, world_size: int, init_method: str, parallel: ParallelConfig) -> dict[str, dict[str, float]]:
    """By mode, what one step tells, the norm of its gradient among it, and a fresh model's ceilings."""
    with open_parallel(parallel, rank, world_size, init_method, 0) as context:
        return {mode: _step(parallel, context, earl) for mode, earl in MODES.items()}


def _step(parallel, context, earl):  # type: ignore[no-untyped-def]
    rl, rollout = RLConfig(max_logprob_diff=1e6, aggregation="seq_mean_token_mean"), RolloutConfig(max_new_tokens=8)
    config = RunConfig(model=MODEL, parallel=parallel, rl=rl, rollout=rollout, earl=earl)
    chunks, scored, layout = build_chunks(MODEL, IMAGE, context, vision_trains=True), answers(), context.layout
    start = {router.layer_number: 1.3 * router.weight.detach() for chunk in chunks for router in chunk.decoder.routers()}
    engine = start_engine(chunks, OptimizerConfig(warmup_steps=0), 10, context, router_lr_scale=1.0)
    pulled = RouterGoals(config, context, {"ocr": 0.3}, start)
    policy = Policy(engine.wrapped, [], config, USABLE, context, pulled)
    advantages_R = np.linspace(-1, 1, len(scored))
    parcels = plan_parcels(scored, advantages_R, minibatches=1, dp_size=layout.dp, multiple=layout.length_multiple, pad_id=0, goals=goals(scored))
    shard = unpack(parcels[context.dp_rank][0])
    parts = [policy_batch(part, context.device, 0) for part in microbatches(shard, 3, layout.length_multiple, layout.pp if layout.vpp > 1 else 1)]
    parts = policy.prepared(parts, with_old=True)
    pulled.begin(parts)
    metrics = optimizer_step(engine, parts, policy, context)
    kept = {name: metrics[name] for name in ("loss", "grad_norm", "num_tokens")}
    return {**kept, **pulled.finish(), **{f"ceiling/{skill}": ceiling for skill, ceiling in pulled.ceilings.items()}}
