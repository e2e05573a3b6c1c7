"""Which layouts a model can have: pure arithmetic on the configuration, without torch.

num_ranks = tp * cp * dp * pp        dense parameters: every tensor split over tp, replicated over cp * dp; layers shared by pp (`stages.py`)
num_ranks = etp * ep * edp * pp      experts: each split over etp, spread over ep, replicated over edp
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.deepspeed import read_deepspeed, stage_of
from megatron_ext.config.schema import ModelConfig, ParallelConfig
from megatron_ext.config.sizes import expert_layers, length_multiple
from megatron_ext.errors import ConfigError, UserError


@dataclass(frozen=True)
class Layout:
    """The grid of ranks with every derived number filled in."""

    tp: int
    sp: bool
    pp: int
    vpp: int
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
        return cls(parallel.tp, parallel.tp > 1, parallel.pp, parallel.vpp, parallel.cp, parallel.ep, etp, dp, parallel.num_ranks)

    @property
    def edp(self) -> int:
        """Replicas of each expert."""
        return self.num_ranks // (self.etp * self.ep * self.pp)

    @property
    def length_multiple(self) -> int:
        """What the length of a row must divide by."""
        return length_multiple(self.tp, self.cp)


def check_layout(model: ModelConfig, parallel: ParallelConfig, where: str = "parallel") -> list[UserError]:
    """Every reason why this model cannot have this layout, each with the values that would work; an empty list when it can."""
    return [*_check_forward(model, parallel, where), *_check_gradients(parallel, Layout.of(parallel), where)]


def check_rollout_layout(model: ModelConfig, parallel: ParallelConfig, where: str = "rollout.parallel") -> list[UserError]:
    """Generation takes a token at a time through the whole model, which leaves no stage and no part of a sequence to others."""
    problems = [
        UserError(f"{where}.{field}", f"{value}: {reason}", "use 1; tp and ep split a replica, rollout.replicas adds more")
        for field, value, reason in (
            ("pp", parallel.pp, "pipeline stages would wait for each other at every token"),
            ("cp", parallel.cp, "a token that is being generated has no sequence to share"),
        )
        if value > 1
    ]
    return problems or _check_forward(model, parallel, where)


def _check_forward(model: ModelConfig, parallel: ParallelConfig, where: str) -> list[UserError]:
    """What it takes to run the model."""
    layout = Layout.of(parallel)
    return [
        *_check_grid(parallel, layout, where),
        *_check_experts(model, parallel, where),
        *_check_tensors(model, layout, where),
        *_check_pipeline(model, parallel, where),
        *_check_engine(parallel, layout, where),
    ]


def _check_gradients(parallel: ParallelConfig, layout: Layout, where: str) -> list[UserError]:
    """What it takes to train it. Without expert parallelism Megatron takes experts for dense parameters, and sums their gradients over the wrong ranks where
    they are split otherwise."""
    if parallel.ep > 1 or layout.etp == parallel.tp:
        return []
    what = f"experts split {layout.etp} ways over a tensor-parallel group of {parallel.tp}, without expert parallelism, would learn from a part of their tokens"
    return [UserError(f"{where}.etp", what, f"use {parallel.tp}, or ep above 1")]


def _check_grid(parallel: ParallelConfig, layout: Layout, where: str) -> list[UserError]:
    """The ranks divide into the dense grid and into the expert grid."""
    problems = []
    ranks = parallel.num_ranks
    dense = parallel.tp * parallel.pp * parallel.cp
    if ranks % dense:
        problems.append(
            UserError(f"{where}.num_ranks", f"{ranks} ranks do not divide by tp * pp * cp = {dense}", f"use a multiple of {dense}, or {_fields(ranks, 'tp')}")
        )
    stage, expert = ranks // parallel.pp, layout.etp * layout.ep
    if ranks % parallel.pp == 0 and stage % expert:
        remedy = f"use ep = {_choices(_divisors(stage // layout.etp))}" if stage % layout.etp == 0 else f"use a multiple of {expert * parallel.pp} ranks"
        what = f"{ranks} ranks" if parallel.pp == 1 else f"the {stage} ranks of a pipeline stage"
        problems.append(UserError(f"{where}.ep", f"{what} do not divide by etp * ep = {layout.etp} * {layout.ep}", remedy))
    return problems


def _check_experts(model: ModelConfig, parallel: ParallelConfig, where: str) -> list[UserError]:
    """A dense model has nothing to spread."""
    asked = {"ep": parallel.ep, "etp": parallel.etp or 1}
    return [
        UserError(f"{where}.{field}", f"{ranks} ranks for the experts of a model that has none (model.num_experts = 0)", "remove it")
        for field, ranks in asked.items()
        if ranks > 1 and not model.num_experts
    ]


def _check_pipeline(model: ModelConfig, parallel: ParallelConfig, where: str) -> list[UserError]:
    """Every stage has a layer, and options that need another have it."""
    problems = []
    stages = parallel.pp * parallel.vpp
    if stages > model.num_layers:
        field = "pp" if parallel.vpp == 1 else "vpp"
        most = model.num_layers if parallel.vpp == 1 else model.num_layers // parallel.pp
        problems.append(
            UserError(f"{where}.{field}", f"{stages} pipeline stages do not fit model.num_layers = {model.num_layers}", f"use at most {max(most, 1)}")
        )
    if parallel.vpp > 1 and parallel.pp == 1:
        problems.append(UserError(f"{where}.vpp", f"{parallel.vpp} chunks a rank interleave stages, but {where}.pp = 1", "use 1, or pp above 1"))
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        problems.append(UserError(f"{where}.overlap_param_gather", f"needs {where}.overlap_grad_reduce, which is false", "set both, or neither"))
    return problems


def _check_engine(parallel: ParallelConfig, layout: Layout, where: str) -> list[UserError]:
    """What engine deepspeed can have of a layout, and whether its file is in order. See decision 0008."""
    if parallel.engine == "megatron":
        if parallel.deepspeed is None:
            return []
        return [
            UserError(f"{where}.deepspeed", f"{str(parallel.deepspeed)!r} would be ignored by {where}.engine = megatron", "remove it, or set engine=deepspeed")
        ]
    needs = f"which {where}.engine = deepspeed does not have"
    problems = []
    if parallel.pp > 1:
        problems.append(UserError(f"{where}.pp", f"{parallel.pp} pipeline stages, {needs}", "use 1, or engine=megatron"))
    if parallel.overlap_param_gather or parallel.overlap_grad_reduce is not None:
        field = "overlap_param_gather" if parallel.overlap_param_gather else "overlap_grad_reduce"
        problems.append(UserError(f"{where}.{field}", f"is a setting of Megatron's data parallelism, {needs}", "remove it; overlap_comm is DeepSpeed's own"))
    if parallel.deepspeed is None:
        problems.append(
            UserError(f"{where}.deepspeed", f"is missing, but {where}.engine = deepspeed needs its JSON file", "for example deepspeed_configs/zero2.json")
        )
        return problems
    try:
        stage = stage_of(read_deepspeed(parallel.deepspeed))
    except ConfigError as error:
        return problems + error.problems
    if stage == 3 and parallel.ep > 1 and layout.etp > 1:
        what = f"{layout.etp} with ep = {parallel.ep} under ZeRO-3: DeepSpeed would leave experts of other tensor-parallel ranks out of the gradient norm"
        problems.append(UserError(f"{where}.etp", what, "use 1, or ZeRO stage 2"))
    return problems


def _check_tensors(model: ModelConfig, layout: Layout, where: str) -> list[UserError]:
    """Every split dimension divides."""
    splits = [
        ("tp", layout.tp, "model.num_attention_heads", model.num_attention_heads),
        ("tp", layout.tp, "model.num_query_groups", model.num_query_groups),
        ("tp", layout.tp, "model.vocab_size", model.vocab_size),
    ]
    if model.num_experts:
        splits += [
            ("ep", layout.ep, "model.num_experts", model.num_experts),
            ("etp", layout.etp, "model.expert_ffn_hidden_size", model.expert_ffn_hidden_size),
        ]
    if len(expert_layers(model)) < model.num_layers:
        splits.append(("tp", layout.tp, "model.ffn_hidden_size", model.ffn_hidden_size))
    if model.clvr.enabled:
        splits.append(("tp", layout.tp, "model.clvr.num_heads", model.clvr.num_heads))
        splits.append(("tp", layout.tp, "model.clvr.num_kv_heads", model.clvr.num_kv_heads))
        splits.append(("tp", layout.tp, "model.clvr.ffn_hidden", model.clvr.ffn_hidden))
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
