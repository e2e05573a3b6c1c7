"""Where the ranks of RL may be. `config/rules.py` asks these with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def fleet_rules(config: RunConfig) -> Iterator[UserError]:
    if config.rl.placement == "disaggregated" and config.rl.fleet == "local":
        problem = "disaggregated with rl.fleet = local, whose processes are given no devices of their own"
        yield UserError("rl.placement", problem, "use rl.fleet=ray, or colocated")
