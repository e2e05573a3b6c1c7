"""What `rl.offload` cannot be with. `config/rules.py` asks these with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError


def offload_rules(config: RunConfig) -> Iterator[UserError]:
    if config.rl.offload and config.rl.max_staleness:
        problem = f"true with rl.max_staleness = {config.rl.max_staleness}: rollouts and learner are at work at the same time, and neither can leave the device"
        yield UserError("rl.offload", problem, "set rl.max_staleness=0, or rl.offload=false")
    if config.rl.offload and config.parallel.engine != "megatron":
        problem = f"true with parallel.engine = {config.parallel.engine}, which keeps its state in buffers of its own"
        yield UserError("rl.offload", problem, "use engine megatron, or offload_optimizer and offload_param in the DeepSpeed file")
