"""Where Ray puts ranks: placement groups of bundles, a bundle being a GPU, or a node where there are none.

colocated        one group: learner and rollouts take turns on all GPUs
disaggregated    a group for each role, and a GPU for each rank: they work at the same time
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_ext.config.rl_schema import Placement
from megatron_ext.errors import RankFailed, UserError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

CPUS_PER_RANK = 0.01
"""Ranks take turns on the cores; Ray only has to place them."""
PLACEMENT_TIMEOUT_S = 60.0
Resources = dict[str, float]
Plan = tuple[list[Resources], Resources]
"""The bundles of a placement group, and what each rank takes of one."""
ANY = ""


@dataclass
class Places:
    """One placement group. `order`: its bundles, those of a node together; `share`: what a rank takes."""

    group: PlacementGroup
    order: list[int]
    share: Resources
    _taken: dict[str, int] = field(default_factory=dict)

    def of(self, name: str) -> PlacementGroupSchedulingStrategy:
        """The place of a rank: a new name gets the next, one that is started anew the same again."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        number = self._taken.setdefault(name, len(self._taken))
        return PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=self.order[number % len(self.order)])


def open_places(ranks: Mapping[str, int], placement: Placement, num_gpus: int, num_nodes: int) -> dict[str, Places]:
    """By role, which is the first word of a rank's name, or ANY. `ranks`: how many there will be of each role. Raises UserError, or RankFailed when Ray has no
    room. The order in which roles are named is that in which they get GPUs."""
    from ray.util.placement_group import placement_group

    places = {}
    for role, (bundles, share) in plan_places(ranks, placement, num_gpus, num_nodes).items():
        group = placement_group(bundles, strategy="PACK" if "GPU" in bundles[0] else "STRICT_SPREAD")
        if not group.wait(PLACEMENT_TIMEOUT_S):
            wanted = f"{sum(ranks.values())} ranks" if role == ANY else f"{ranks[role]} {role} ranks"
            raise RankFailed(f"Ray found no room for {wanted} on {num_nodes} nodes within {PLACEMENT_TIMEOUT_S:.0f} s", kind="late")
        places[role] = Places(group, _by_node(group), share)
    return places


def plan_places(ranks: Mapping[str, int], placement: Placement, num_gpus: int, num_nodes: int = 1) -> dict[str, Plan]:
    """What `open_places` asks Ray for.

    >>> plan_places({"learner": 1, "rollout": 2}, "disaggregated", num_gpus=4)["rollout"]
    ([{'CPU': 0.01, 'GPU': 1}, {'CPU': 0.01, 'GPU': 1}], {'num_cpus': 0.01, 'num_gpus': 1.0})
    """
    total = sum(ranks.values())
    if placement == "colocated":
        return {ANY: place_ranks(total, num_gpus, num_nodes)}
    if 0 < num_gpus < total:
        wanted = " and ".join(f"{count} {role} ranks" for role, count in ranks.items())
        problem = f"disaggregated needs a GPU for each of {wanted}, {total} in all, and there are {num_gpus}"
        raise UserError("rl.placement", problem, "use colocated, or fewer rollout.replicas")
    return {role: place_ranks(count, min(count, num_gpus), num_nodes) for role, count in ranks.items()}


def place_ranks(num_ranks: int, num_gpus: int, num_nodes: int = 1) -> Plan:
    """Rank n gets bundle n modulo their number: ranks that follow each other, as those of the learner do, are on different GPUs, and share a GPU with ranks
    that work while they wait.

    >>> place_ranks(4, 2)
    ([{'CPU': 0.02, 'GPU': 1}, {'CPU': 0.02, 'GPU': 1}], {'num_cpus': 0.01, 'num_gpus': 0.5})
    >>> place_ranks(4, 0, num_nodes=2)
    ([{'CPU': 0.02}, {'CPU': 0.02}], {'num_cpus': 0.01})
    """
    if num_gpus == 0:
        return [{"CPU": CPUS_PER_RANK * -(-num_ranks // num_nodes)}] * num_nodes, {"num_cpus": CPUS_PER_RANK}
    per_gpu = -(-num_ranks // num_gpus)
    return [{"CPU": CPUS_PER_RANK * per_gpu, "GPU": 1}] * num_gpus, {"num_cpus": CPUS_PER_RANK, "num_gpus": math.floor(100 / per_gpu) / 100}


def _by_node(group: PlacementGroup) -> list[int]:
    """The bundles' indices: Ray hands them out in an order of its own."""
    from ray.util.placement_group import placement_group_table

    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(node_of, key=lambda index: (node_of[index], index))
