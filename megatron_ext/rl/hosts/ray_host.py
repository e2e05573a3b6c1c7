"""Ranks as Ray actors: one actor per rank, all in one placement group, none ever restarted or retried by Ray (a rank's state would silently be lost).

What goes wrong is said by name: an actor that dies fails its pending verb with `RankFailed` within a tenth of a second; one that hangs is caught by the
verb's deadline. Ray is imported where it is used, after `local_cluster` has set its environment.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.errors import RankFailed
from megatron_ext.parallel.store import free_port
from megatron_ext.rl.hosts.local_host import CARRIED
from megatron_ext.rl.hosts.ranks import LOOPBACK, Rank
from megatron_ext.rl.hosts.ray_cluster import local_cluster, spanning_cluster

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.util.placement_group import PlacementGroup

    from megatron_ext.rl.hosts.ray_node import Nodes

CPUS_PER_RANK = 0.01
"""Ranks take turns on the cores; Ray only has to place them."""
Resources = dict[str, float]
PLACEMENT_TIMEOUT_S = 60.0
START_TIMEOUT_S = 600.0
"""Actors import torch and Megatron before they answer, on some clusters from a slow file system."""


class RayHost:
    """See `ranks.Host`. Made by `ray_host()`, which also ends it."""

    def __init__(self, folder: Path, group: PlacementGroup, order: Sequence[int], share: Resources, *, spans: bool) -> None:
        self.folder, self._group, self._order, self._share, self._spans = folder, group, order, share, spans
        self._pending: dict[str, ObjectRef[Any]] = {}
        self._actors: list[Any] = []

    def address(self, rank: Rank) -> str:
        return self._where(rank)[0] if self._spans else LOOPBACK

    def meeting_point(self, world: str, first: Rank) -> str:
        if not self._spans:
            return f"file://{self.folder}/{world}.store"
        address, port = self._where(first)
        return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"

    def start(self, role: type, names: Sequence[str]) -> list[Rank]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor_class = ray.remote(_Actor)
        ranks = []
        for name in names:
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._order[len(self._actors) % len(self._order)])
            actor = actor_class.options(**self._share, max_restarts=0, max_task_retries=0, scheduling_strategy=place).remote(role)
            self._actors.append(actor)
            ranks.append(Rank(name, self._actors[-1]))
        return ranks

    def send(self, rank: Rank, verb: str, arguments: tuple[Any, ...]) -> None:
        self._pending[rank.name] = rank.process.obey.remote(verb, arguments)

    def ready(self, ranks: Sequence[Rank], timeout_s: float) -> list[Rank]:
        import ray

        pending = [self._pending[rank.name] for rank in ranks]
        done, _ = ray.wait(pending, num_returns=1, timeout=timeout_s)
        return [rank for rank in ranks if self._pending[rank.name] in done]

    def take(self, rank: Rank) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(self._pending.pop(rank.name))
        except RayActorError as error:
            raise RankFailed(f"{rank.name} died while it was working: {error}") from None
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, CARRIED) else RankFailed(f"{rank.name} failed:\n{error}") from None

    def _where(self, rank: Rank) -> tuple[str, int]:
        """The address of a rank's node, and a port that is free there."""
        import ray
        from ray.exceptions import RayActorError

        try:
            return ray.get(rank.process.where.remote(), timeout=START_TIMEOUT_S)
        except RayActorError as error:
            raise RankFailed(f"{rank.name} died as it started: {error}") from None


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
            raise RankFailed(f"Ray found no room for {num_ranks} ranks on {num_nodes} nodes within {PLACEMENT_TIMEOUT_S:.0f} s")
        yield RayHost(folder, group, _by_node(group), share, spans=nodes is not None)


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


class _Actor:
    """Holds the role's object in the actor's process."""

    def __init__(self, role: type) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the driver
        self._role = role()

    def where(self) -> tuple[str, int]:
        import ray

        address = ray.util.get_node_ip_address()
        return address, free_port(address)

    def obey(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._role, verb)(*arguments)
