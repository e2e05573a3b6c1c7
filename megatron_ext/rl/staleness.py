"""Whether rollouts are of weights that the learner may still learn from: never newer than its own, and not older than `rl.max_staleness` steps."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_ext.config.schema import RLConfig
from megatron_ext.errors import WeightSyncError
from megatron_ext.rl.parcels import Row


def require_versions(rows: Iterable[Row], present: int, rl: RLConfig) -> None:
    """`present`: the version of the learner's weights. Raises WeightSyncError naming the first rollout that is not of weights it may be of."""
    for row in rows:
        oldest, newest = int(row.versions_T[row.versions_T >= 0].min()), int(row.versions_T.max())
        if newest > present:
            raise WeightSyncError(f"rollout {row.key} of version {newest} reached a learner of version {present}, which never had these weights")
        if oldest < present - rl.max_staleness:
            limit = f"rl.max_staleness = {rl.max_staleness} allows {present - rl.max_staleness} at the oldest"
            raise WeightSyncError(f"rollout {row.key} of version {oldest} reached a learner of version {present}; {limit}")
        if oldest < newest and not rl.partial_rollouts:
            raise WeightSyncError(f"rollout {row.key} was sampled by versions {oldest} to {newest}, but rl.partial_rollouts is off")
