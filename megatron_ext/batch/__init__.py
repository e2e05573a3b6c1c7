"""The values that cross boundaries: prompts, rollouts, routes, learner batches. numpy only."""

from megatron_ext.batch.markers import NO_MARKERS, Markers
from megatron_ext.batch.rollout import FailedRollout, LearnerBatch, Prompt, Rollout, ScoredRollout
from megatron_ext.batch.routing import ContinuedRoutes, RouteTrace, expert_dtype, gate_mass, gate_mass_at, route_digest
from megatron_ext.batch.tiles import NO_TILES, Tiles

__all__ = [
    "NO_MARKERS", "NO_TILES", "ContinuedRoutes", "FailedRollout", "LearnerBatch", "Markers", "Prompt", "Rollout", "RouteTrace", "ScoredRollout", "Tiles",
    "expert_dtype", "gate_mass", "gate_mass_at", "route_digest",
]  # fmt: skip
