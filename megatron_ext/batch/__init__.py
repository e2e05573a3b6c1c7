"""The values that cross boundaries: prompts, rollouts, routes, learner batches. numpy only."""

from megatron_ext.batch.rollout import FailedRollout, LearnerBatch, Prompt, Rollout, ScoredRollout
from megatron_ext.batch.routing import RouteTrace, expert_dtype, gate_mass, route_digest

__all__ = ["FailedRollout", "LearnerBatch", "Prompt", "Rollout", "RouteTrace", "ScoredRollout", "expert_dtype", "gate_mass", "route_digest"]
