"""What `rollout.deterministic` cannot keep in every bit. `config/rules.py` asks these with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.schema import ParallelConfig, RunConfig
from megatron_ext.errors import UserError

_MOST_TP = 2
"""A sum of two partial results is the same in either order; how gloo adds up more depends on where a number stands in the message."""


def exact_rules(config: RunConfig) -> Iterator[UserError]:
    if not config.rollout.deterministic:
        return
    mode, learner, rollout = "rollout.deterministic = true", config.parallel, config.rollout.parallel
    if config.model.dtype != "fp32":
        yield UserError("model.dtype", f"{config.model.dtype} with {mode}, whose kernels are for float32", "use fp32")
    for field, ours, theirs in (("tp", learner.tp, rollout.tp), ("etp", _etp(learner), _etp(rollout))):
        if ours != theirs:
            problem = f"{theirs} with {mode}, and parallel.{field} = {ours}: partial sums of other parts round differently"
            yield UserError(f"rollout.parallel.{field}", problem, f"use {ours}")
    for where, parallel in (("parallel", learner), ("rollout.parallel", rollout)):
        if parallel.tp > _MOST_TP:
            yield UserError(f"{where}.tp", f"{parallel.tp} with {mode}: more than {_MOST_TP} partial sums have no fixed order", f"use at most {_MOST_TP}")
        if parallel.threads_per_rank > 1:
            problem = f"{parallel.threads_per_rank} with {mode}: threads cut an operation at places that depend on its size"
            yield UserError(f"{where}.threads_per_rank", problem, "use 1, and more ranks")


def _etp(parallel: ParallelConfig) -> int:
    return parallel.etp or (1 if parallel.ep > 1 else parallel.tp)
