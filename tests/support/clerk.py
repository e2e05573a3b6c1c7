"""A role without a model, for tests of the hosts. In a light module of its own, because ranks import it."""

from __future__ import annotations

import os
import signal
import time

from megatron_ext.errors import UserError
from megatron_ext.rl.hosts.ranks import Place, confine_gloo


class Clerk:
    """A rank without a model."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def remember(self, value: object) -> list[object]:
        self.seen.append(value)
        return list(self.seen)

    def refuse(self) -> None:
        raise UserError("rl.steps", "-1 is negative", "use 0 or more")

    def stumble(self) -> None:
        raise KeyError("no such thing")

    def pid(self) -> int:
        return os.getpid()

    def compute(self, seconds: float) -> None:
        """Never waits, and never gives the interpreter away by itself."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(1000))

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def world(self, place: Place) -> float:
        """The sum over its world of rank + 1, each summand from its own rank."""
        import torch
        import torch.distributed as dist

        confine_gloo(place.address)
        dist.init_process_group("gloo", init_method=place.meeting_point, rank=place.rank, world_size=place.world_size)
        total = torch.tensor(place.rank + 1.0)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return float(total)
