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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_ext.errors import RankFailed
from megatron_ext.rl.local_fleet import CARRIED
from megatron_ext.rl.ranks import Rank
from megatron_ext.rl.ray_cluster import local_cluster

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.util.placement_group import PlacementGroup

CPUS_PER_RANK = 0.01
"""Ranks take turns on the cores; Ray only has to place them."""
Resources = dict[str, float]
PLACEMENT_TIMEOUT_S = 60.0


class RayHost:
    """See `ranks.Host`. Made by `ray_host()`, which also ends it."""

    def __init__(self, folder: Path, group: PlacementGroup, share: Resources) -> None:
        self.folder, self._group, self._share = folder, group, share
        self._pending: dict[str, ObjectRef[Any]] = {}
        self._actors: list[Any] = []

    def start(self, role: type, names: Sequence[str]) -> list[Rank]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        actor_class = ray.remote(_Actor)
        ranks = []
        for name in names:
            place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=len(self._actors) % self._group.bundle_count)
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


@contextmanager
def ray_host(num_ranks: int) -> Iterator[RayHost]:
    """A cluster of this machine with room for `num_ranks` ranks."""
    bundles, share = place_ranks(num_ranks, torch.cuda.device_count())
    with local_cluster(num_cpus=os.cpu_count() or 1, num_gpus=torch.cuda.device_count()) as folder:
        from ray.util.placement_group import placement_group

        group = placement_group(bundles, strategy="PACK")
        if not group.wait(PLACEMENT_TIMEOUT_S):
            raise RankFailed(f"Ray found no room for {num_ranks} ranks within {PLACEMENT_TIMEOUT_S:.0f} s")
        yield RayHost(folder, group, share)


def place_ranks(num_ranks: int, num_gpus: int) -> tuple[list[Resources], Resources]:
    """Bundles for the placement group, and what each rank takes of its own. Rank n gets bundle n modulo their number: ranks that follow each other, as those of
    the learner do, are on different GPUs, and share a GPU with ranks that work while they wait.

    >>> place_ranks(4, 2)
    ([{'CPU': 0.02, 'GPU': 1}, {'CPU': 0.02, 'GPU': 1}], {'num_cpus': 0.01, 'num_gpus': 0.5})
    """
    if num_gpus == 0:
        return [{"CPU": CPUS_PER_RANK}] * num_ranks, {"num_cpus": CPUS_PER_RANK}
    per_gpu = -(-num_ranks // num_gpus)
    return [{"CPU": CPUS_PER_RANK * per_gpu, "GPU": 1}] * num_gpus, {"num_cpus": CPUS_PER_RANK, "num_gpus": math.floor(100 / per_gpu) / 100}


class _Actor:
    """Holds the role's object in the actor's process."""

    def __init__(self, role: type) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C belongs to the driver
        self._role = role()

    def obey(self, verb: str, arguments: tuple[Any, ...]) -> Any:
        return getattr(self._role, verb)(*arguments)
