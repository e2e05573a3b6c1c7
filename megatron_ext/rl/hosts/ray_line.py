"""The driver's line to one Ray actor."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from megatron_ext.errors import RankFailed
from megatron_ext.rl.hosts.ranks import CARRIED
from megatron_ext.rl.hosts.ray_actor import KILL_TIMEOUT_S, LIFE, Home, kill_process

if TYPE_CHECKING:
    from ray import ObjectRef

START_TIMEOUT_S = 600.0
"""Ray may take its time to start an actor, on some clusters from a slow file system."""


class RayLine:
    """`name` is the rank's."""

    def __init__(self, name: str, actor: Any) -> None:
        self._name, self._actor = name, actor
        self.verb: ObjectRef[Any] | None = None
        """What it is busy with, or has not been asked for the answer of."""
        self._ping: ObjectRef[Any] = self._ask_life()
        self._home: Home | None = None
        self._signs: int | None = None
        self._ending, self._ended = threading.Lock(), False

    def send(self, verb: str, arguments: tuple[Any, ...]) -> None:
        self.verb = self._actor.obey.remote(verb, arguments)

    def take(self) -> Any:
        """The answer that is there. Raises what the rank raised, or RankFailed."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        reference, self.verb = self.verb, None
        try:
            return ray.get(reference)
        except RayActorError as error:
            raise RankFailed(f"{self._name} died while it was working: {error}", self._name, "died") from None
        except RayTaskError as error:
            cause = error.cause
            raise cause if isinstance(cause, CARRIED) else RankFailed(f"{self._name} failed:\n{error}", self._name, "raised") from None

    def signs(self) -> int | None:
        """How often it has answered to a call, at most one at a time; None before the first. Does not wait."""
        import ray
        from ray.exceptions import RayError

        if not self._ended and ray.wait([self._ping], timeout=0)[0]:
            with suppress(RayError):  # it is dead, as its verb will say
                self._home = ray.get(self._ping)
                self._signs = (self._signs or 0) + 1
                self._ping = self._ask_life()
        return self._signs

    def home(self) -> Home:
        """Where it is, once it has started. Raises RankFailed when it does not."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        if self._home is None:
            try:
                self._home = ray.get(self._ask_life(), timeout=START_TIMEOUT_S)
            except RayActorError as error:
                raise RankFailed(f"{self._name} died as it started: {error}", self._name, "died") from None
            except GetTimeoutError:
                raise RankFailed(f"{self._name} did not start within {START_TIMEOUT_S:.0f} s", self._name, "late") from None
        return self._home

    def free_port(self) -> int:
        """On its node, at the address where it is reached."""
        import ray
        from ray.exceptions import RayActorError

        try:
            return ray.get(self._actor.free_port.options(concurrency_group=LIFE).remote(self.home().address), timeout=START_TIMEOUT_S)
        except RayActorError as error:
            raise RankFailed(f"{self._name} died as it started: {error}", self._name, "died") from None

    def end(self) -> None:
        """By its process id on its node: a process that is stopped does not hear Ray, which frees its place when it is gone."""
        import ray

        with self._ending:
            if self._ended:
                return
            self._ended = True
            ray.kill(self._actor, no_restart=True)
            if self._home is not None:
                _kill(self._home)

    def _ask_life(self) -> ObjectRef[Any]:
        return self._actor.live.options(concurrency_group=LIFE).remote()


def _kill(home: Home) -> None:
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if home.node == ray.get_runtime_context().get_node_id():
        kill_process(home.pid)
        return
    there = ray.remote(kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(home.node, soft=False))
    with suppress(RayError):  # the node is gone, or as good as that
        ray.get(there.remote(home.pid), timeout=2 * KILL_TIMEOUT_S)
