"""Rules of the stages that learn from given examples, `pretrain`, `sft` and `mpo`: batches, mixtures, optimizers. `config/rules.py` asks them with its own."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_ext.config.data_rules import budget_rules
from megatron_ext.config.schema import OptimizerConfig, ParallelConfig, RunConfig, StageConfig, TrainConfig
from megatron_ext.config.sizes import data_parallel
from megatron_ext.errors import UserError

Problems = Iterator[UserError]
_MOST_DIVISORS = 12


def stage_rules(config: RunConfig) -> Problems:
    for name, stage in (("pretrain", config.pretrain), ("sft", config.sft)):
        yield from _batches(name, stage, data_parallel(config.parallel))
        if stage.micro_batch_tokens:
            yield from budget_rules(name, stage, config.data, config.parallel)
        else:
            yield from _interleaved(name, stage, config.parallel)
        yield from mix_rules(f"{name}.mix", stage.mix, ("caption", "qa", "composite"))
        if stage.text:
            yield from mix_rules(f"{name}.text", stage.text, tuple(stage.text))
        yield from optimizer_rules(f"{name}.optimizer", stage.optimizer)
    if config.mpo.steps:
        yield from _mpo(config)


def _mpo(config: RunConfig) -> Problems:
    mpo = config.mpo
    yield from _batches("mpo", mpo, data_parallel(config.parallel), "pairs")
    yield from _interleaved("mpo", mpo, config.parallel)
    yield from mix_rules("mpo.mix", mpo.mix, ("qa", "composite"))
    yield from optimizer_rules("mpo.optimizer", mpo.optimizer)
    if mpo.pairs is None and config.data.kind != "suite":
        yield UserError("mpo.pairs", f"is missing, and data.kind = {config.data.kind} has right answers only", "name a JSONL file of pairs, or set mpo.steps=0")
    if not mpo.dpo_weight and not mpo.bco_weight:
        yield UserError("mpo.dpo_weight", "and mpo.bco_weight are 0: nothing would be learnt from wrong answers", "use 0.8 and 0.2, or the stage sft")


def _batches(name: str, stage: StageConfig, dp: int, what: str = "conversations") -> Problems:
    if dp and stage.global_batch % dp:
        yield UserError(f"{name}.global_batch", f"{stage.global_batch} cannot be shared by {dp} data-parallel ranks", f"use a multiple of {dp}")
    elif dp and not _budget(stage) and (stage.global_batch // dp) % stage.micro_batch:
        share = stage.global_batch // dp
        yield UserError(
            f"{name}.micro_batch",
            f"{stage.micro_batch} does not divide the {share} {what} of a rank ({name}.global_batch = {stage.global_batch} over {dp} ranks)",
            f"use {_divisors(share)}",
        )


def _budget(stage: StageConfig) -> int:
    return stage.micro_batch_tokens if isinstance(stage, TrainConfig) else 0


def _interleaved(name: str, stage: StageConfig, parallel: ParallelConfig) -> Problems:
    """Megatron's interleaved schedule hands micro-batches round in groups of pp."""
    dp = data_parallel(parallel)
    if parallel.vpp == 1 or not dp or stage.global_batch % (dp * stage.micro_batch):
        return
    microbatches = stage.global_batch // dp // stage.micro_batch
    if microbatches % parallel.pp:
        yield UserError(
            f"{name}.micro_batch",
            f"{stage.micro_batch} makes {microbatches} micro-batches of a rank's {stage.global_batch // dp} conversations, which parallel.vpp = {parallel.vpp} "
            f"needs in groups of parallel.pp = {parallel.pp}",
            f"make {name}.global_batch / dp / micro_batch a multiple of {parallel.pp}",
        )


def mix_rules(field: str, mix: dict[str, float], known: tuple[str, ...]) -> Problems:
    for kind, weight in mix.items():
        if kind not in known:
            yield UserError(f"{field}.{kind}", "is not a kind of conversation", f"use {', '.join(known)}")
        if weight < 0:
            yield UserError(f"{field}.{kind}", f"the weight {weight:g} is negative", "use 0 to leave a kind out")
    if not any(weight > 0 for weight in mix.values()):
        yield UserError(field, "gives no kind of conversation a weight above 0", f"weigh one of {', '.join(known)}")


def optimizer_rules(field: str, optimizer: OptimizerConfig) -> Problems:
    if optimizer.min_lr > optimizer.lr:
        yield UserError(f"{field}.min_lr", f"{optimizer.min_lr:g} is more than lr = {optimizer.lr:g}", "the schedule falls from lr to min_lr")
    for beta in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, beta) < 1:
            yield UserError(f"{field}.{beta}", f"{getattr(optimizer, beta):g} is not in [0, 1)", "0.9 and 0.98 are usual")
    if optimizer.eps <= 0:
        yield UserError(f"{field}.eps", f"{optimizer.eps:g} is not positive", "1e-8 is usual")


def must_divide(field: str, value: int, other: str, total: int) -> UserError:
    return UserError(field, f"{value} does not divide {other} = {total}", f"use {_divisors(total)}")


def _divisors(total: int) -> str:
    """The divisors of a number in words; of many, the smallest."""
    divisors = [str(n) for n in range(1, total + 1) if total % n == 0]
    if len(divisors) > _MOST_DIVISORS:
        divisors = [*divisors[: _MOST_DIVISORS - 1], "..."]
    return ", ".join(divisors[:-1]) + (f" or {divisors[-1]}" if len(divisors) > 1 else divisors[-1])
