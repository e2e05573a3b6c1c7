"""Ranks as Ray actors: one actor per rank, each at a place of its own, none ever restarted or retried by Ray (a rank's state would silently be lost).

What goes wrong is said by name: an actor that dies fails its pending verb with `RankFailed` within a tenth of a second; one that is stopped answers no calls
for signs of life. Ray is imported where it is used, after `local_cluster` has set its environment.
"""

from __future__ import annotations

import itertools
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.errors import RankFailed
from megatron_ext.rl.hosts.pulse import Pulse
from megatron_ext.rl.hosts.ranks import LOOPBACK, Rank
from megatron_ext.rl.hosts.ray_actor import LIFE, RankActor
from megatron_ext.rl.hosts.ray_cluster import local_cluster, spanning_cluster
from megatron_ext.rl.hosts.ray_line import RayLine
from megatron_ext.rl.hosts.ray_processes import Head

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

    from megatron_ext.rl.hosts.ray_node import Nodes

CPUS_PER_RANK = 0.01
"""Ranks take turns on the cores; Ray only has to place them."""
Resources = dict[str, float]
PLACEMENT_TIMEOUT_S = 60.0


class RayHost:
    """See `ranks.Host`. Made by `ray_host()`, which also ends it."""

    def __init__(self, folder: Path, group: PlacementGroup, order: Sequence[int], share: Resources, *, spans: bool) -> None:
        self.folder, self._group, self._order, self._share, self._spans = folder, group, order, share, spans
        self._ranks: dict[str, Rank] = {}
        self._places: dict[str, int] = {}
        """The bundle of each name, which one that is started anew gets again."""
        self._numbers = itertools.count()
        self._head = Head(folder / "token")
        self._points: set[str] = set()
        self._pulse = Pulse(lambda: {rank: _line(rank).signs() for rank in list(self._ranks.values())})

    def address(self, rank: Rank) -> str:
        return _line(rank).home().address if self._spans else LOOPBACK

    def meeting_point(self, world: str, first: Rank) -> str:
        if not self._spans:
            return f"file://{self.folder}/{world}-{next(self._numbers)}.store"
        address = self.address(first)
        while (point := f"tcp://{f'[{address}]' if ':' in address else address}:{_line(first).free_port()}") in self._points:
            pass
        self._points.add(point)
        return point

    def start(self, role: type, names: Sequence[str], world: str = "") -> list[Rank]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor_class = ray.remote(concurrency_groups={LIFE: 1}, max_restarts=0, max_task_retries=0, **self._share)(RankActor)
        ranks = []
        for name in names:
            if name in self._ranks:
                self.end(self._ranks[name])
            bundle = self._order[self._places.setdefault(name, len(self._places)) % len(self._order)]
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
            ranks.append(Rank(name, RayLine(name, actor_class.options(scheduling_strategy=place).remote(pickle.dumps(role))), world))
            self._ranks[name] = ranks[-1]
        return ranks

    def send(self, rank: Rank, verb: str, arguments: tuple[Any, ...]) -> None:
        _line(rank).send(verb, arguments)

    def ready(self, ranks: Sequence[Rank], timeout_s: float) -> list[Rank]:
        import ray

        self._require_head()
        verbs = {_line(rank).verb: rank for rank in ranks}
        ray.wait(list(verbs), num_returns=1, timeout=timeout_s)
        done, _ = ray.wait(list(verbs), num_returns=len(verbs), timeout=0)
        return [verbs[verb] for verb in done]

    def take(self, rank: Rank) -> Any:
        try:
            return _line(rank).take()
        except RankFailed:
            self._require_head()
            raise

    def end(self, rank: Rank) -> None:
        _line(rank).end()
        if self._ranks.get(rank.name) is rank:
            del self._ranks[rank.name]

    def silent_s(self, rank: Rank) -> float:
        return self._pulse.silent_s(rank)

    def _require_head(self) -> None:
        """Raises RankFailed of no rank: there is none to start again."""
        if (lost := self._head.lost()) is not None:
            raise RankFailed(f"{lost}, and with it this run's cluster: run again to resume")

    def close(self) -> None:
        """Looks no longer. The ranks end with the cluster."""
        self._pulse.close()


def _line(rank: Rank) -> RayLine:
    return rank.process


@contextmanager
def ray_host(num_ranks: int, nodes: Nodes | None = None) -> Iterator[RayHost]:
    """A cluster with room for `num_ranks` ranks: of this machine, or over several, all of which have the GPUs that this one has."""
    num_gpus, num_nodes = torch.cuda.device_count(), 1 if nodes is None else len(nodes.addresses)
    bundles, share = place_ranks(num_ranks, num_gpus * num_nodes, num_nodes)
    cluster = local_cluster if nodes is None else partial(spanning_cluster, nodes)
    with cluster(num_cpus=os.cpu_count() or 1, num_gpus=num_gpus) as folder:
        from ray.util.placement_group import placement_group

        group = placement_group(bundles, strategy="STRICT_SPREAD" if len(bundles) == num_nodes else "PACK")
        if not group.wait(PLACEMENT_TIMEOUT_S):
            raise RankFailed(f"Ray found no room for {num_ranks} ranks on {num_nodes} nodes within {PLACEMENT_TIMEOUT_S:.0f} s", kind="late")
        host = RayHost(folder, group, _by_node(group), share, spans=nodes is not None)
        try:
            yield host
        finally:
            host.close()


def place_ranks(num_ranks: int, num_gpus: int, num_nodes: int = 1) -> tuple[list[Resources], Resources]:
    """Bundles for the placement group, and what each rank takes of its own: a bundle is a GPU, or a node where there are none. Rank n gets bundle n modulo
    their number: ranks that follow each other, as those of the learner do, are on different GPUs, and share a GPU with ranks that work while they wait.

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
    """The bundles' indices, those of a node together: Ray hands them out in an order of its own."""
    from ray.util.placement_group import placement_group_table

    node_of: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return sorted(node_of, key=lambda index: (node_of[index], index))
