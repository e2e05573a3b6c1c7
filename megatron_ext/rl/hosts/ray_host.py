"""Ranks as Ray actors: one actor per rank, each at a place of its own, none ever restarted or retried by Ray (a rank's state would silently be lost).

What goes wrong is said by name: an actor that dies fails its pending verb with `RankFailed` within a tenth of a second; one that is stopped answers no calls
for signs of life. Ray is imported where it is used, after `local_cluster` has set its environment.
"""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.config.rl_schema import Placement
from megatron_ext.errors import RankFailed
from megatron_ext.rl.hosts.pulse import Pulse
from megatron_ext.rl.hosts.ranks import LOOPBACK, Rank
from megatron_ext.rl.hosts.ray_actor import LIFE, RankActor
from megatron_ext.rl.hosts.ray_cluster import local_cluster, spanning_cluster
from megatron_ext.rl.hosts.ray_line import RayLine
from megatron_ext.rl.hosts.ray_places import ANY, Places, open_places, plan_places
from megatron_ext.rl.hosts.ray_processes import Head

if TYPE_CHECKING:
    from megatron_ext.rl.hosts.ray_node import Nodes


class RayHost:
    """See `ranks.Host`. Made by `ray_host()`, which also ends it."""

    def __init__(self, folder: Path, places: Mapping[str, Places], *, spans: bool) -> None:
        self.folder, self._places, self._spans = folder, places, spans
        self._ranks: dict[str, Rank] = {}
        self._numbers = itertools.count()
        self._head = Head(folder / "token")
        self._points: set[str] = set()
        self._pulse = Pulse(lambda: {rank: _line(rank).signs() for rank in list(self._ranks.values())})

    def address(self, rank: Rank) -> str:
        return _line(rank).home().address if self._spans else LOOPBACK

    def whereabouts(self, rank: Rank) -> tuple[str, int]:
        home = _line(rank).home()
        return home.address, home.pid

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

        actor_class = ray.remote(concurrency_groups={LIFE: 1}, max_restarts=0, max_task_retries=0)(RankActor)
        ranks = []
        for name in names:
            if name in self._ranks:
                self.end(self._ranks[name])
            role_name = name.split()[0]
            places = self._places[role_name if role_name in self._places else ANY]
            actor = actor_class.options(**places.share, scheduling_strategy=places.of(name)).remote(pickle.dumps(role))
            ranks.append(Rank(name, RayLine(name, actor), world))
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
def ray_host(ranks: Mapping[str, int], placement: Placement = "colocated", nodes: Nodes | None = None) -> Iterator[RayHost]:
    """A cluster with room for so many ranks of each role, on this machine, or over several, all of which have the GPUs that this one has."""
    num_gpus, num_nodes = torch.cuda.device_count(), 1 if nodes is None else len(nodes.addresses)
    plan_places(ranks, placement, num_gpus * num_nodes, num_nodes)  # says what is wrong before a cluster is started
    cluster = local_cluster if nodes is None else partial(spanning_cluster, nodes)
    with cluster(num_cpus=os.cpu_count() or 1, num_gpus=num_gpus) as folder:
        host = RayHost(folder, open_places(ranks, placement, num_gpus * num_nodes, num_nodes), spans=nodes is not None)
        try:
            yield host
        finally:
            host.close()
