"""Which layouts a model can have: pure arithmetic on the configuration, without torch.

num_ranks = tp * dp            dense parameters: every tensor split over tp, replicated over dp
num_ranks = etp * ep * edp     experts: each split over etp, spread over ep, replicated over edp
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class Layout:
    """The grid of ranks with every derived number filled in."""

    tp: int
    sp: bool
    pp: int
    cp: int
    ep: int
    etp: int
    dp: int
    num_ranks: int

    @classmethod
    def of(cls, parallel: ParallelConfig) -> Layout:
        """The layout that the configuration asks for; `check_layout` says whether a model can have it."""
        etp = parallel.etp or (1 if parallel.ep > 1 else parallel.tp)
        dp = parallel.num_ranks // (parallel.tp * parallel.pp * parallel.cp)
        return cls(parallel.tp, parallel.tp > 1, parallel.pp, parallel.cp, parallel.ep, etp, dp, parallel.num_ranks)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.num_ranks // (self.etp * self.ep * self.pp)


def check_layout(model: ModelConfig, parallel: ParallelConfig, where: str = "parallel") -> list[UserError]:
    """Every reason why this model cannot have this layout, each with the values that would work; an empty list when it can."""
    problems = [
        UserError(f"{where}.{field}", f"{kind} parallelism is not in this release (asked for {value})", "use 1")
        for field, kind, value in (("pp", "pipeline", parallel.pp), ("cp", "context", parallel.cp))
        if value > 1
    ]
    layout = Layout.of(parallel)
    problems += _check_grid(parallel, layout, where)
    problems += _check_tensors(model, layout, where)
    return problems


def _check_grid(parallel: ParallelConfig, layout: Layout, where: str) -> list[UserError]:
    """The ranks divide into the dense grid and into the expert grid."""
    problems = []
    ranks = parallel.num_ranks
    dense = parallel.tp * parallel.pp * parallel.cp
    if ranks % dense:
        problems.append(
            UserError(f"{where}.num_ranks", f"{ranks} ranks do not divide by tp * pp * cp = {dense}", f"use a multiple of {dense}, or {_fields(ranks, 'tp')}")
        )
    expert = layout.etp * layout.ep * parallel.pp
    if ranks % expert:
        remedy = f"use ep = {_choices(_divisors(ranks // layout.etp))}" if ranks % layout.etp == 0 else f"use a multiple of {expert} ranks"
        problems.append(UserError(f"{where}.ep", f"{ranks} ranks do not divide by etp * ep = {layout.etp} * {layout.ep}", remedy))
    return problems


def _check_tensors(model: ModelConfig, layout: Layout, where: str) -> list[UserError]:
    """Every split dimension divides."""
    splits = [
        ("tp", layout.tp, "model.num_attention_heads", model.num_attention_heads),
        ("tp", layout.tp, "model.num_query_groups", model.num_query_groups),
        ("tp", layout.tp, "model.vocab_size", model.vocab_size),
        ("ep", layout.ep, "model.num_experts", model.num_experts),
        ("etp", layout.etp, "model.expert_ffn_hidden_size", model.expert_ffn_hidden_size),
    ]
    if model.clvr.enabled:
        splits.append(("tp", layout.tp, "model.clvr.num_heads", model.clvr.num_heads))
        splits.append(("tp", layout.tp, "model.clvr.num_kv_heads", model.clvr.num_kv_heads))
    return [
        UserError(f"{where}.{field}", f"{ranks} does not divide {name} = {size}", f"use {_choices(_divisors(size))}")
        for field, ranks, name, size in splits
        if size % ranks
    ]


def _divisors(number: int) -> list[int]:
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _fields(ranks: int, field: str) -> str:
    return f"{field} = {_choices(_divisors(ranks))}"


def _choices(values: list[int]) -> str:
    """At most eight values as words: "1, 2 or 4"."""
    shown = [str(value) for value in values[:8]]
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + f" or {shown[-1]}"
