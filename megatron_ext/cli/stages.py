"""The stages of a recipe: what each needs, what it depends on, and the one call that does it.

    tokenizer -> pretrain -> sft (-> mpo) -> discover -> evaluate-sft
                                                \\-> rl -> evaluate-rl

The expert clusters are found before the first evaluation, so that their use is measured before and after RL.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_ext.cli.launched import Launch
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.parallel.stopping import stop_on_signals


@dataclass(frozen=True)
class Stage:
    """`sections`: the parts of the configuration, or single fields, that this stage adds to those of the stages it needs.
    `outputs`: what it owns in the run's folder, its own folder first. `supervised`: every rank that a launcher has started takes part in it."""

    name: str
    needs: tuple[str, ...]
    sections: tuple[str, ...]
    outputs: tuple[str, ...]
    execute: Callable[[RunConfig, RunFolder, Launch], dict[str, Any]]
    supervised: bool = False

    def folder(self, run: RunFolder) -> Path:
        return run.root / self.outputs[0]


def _tokenizer(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    from megatron_ext.data.sources import skills_in
    from megatron_ext.data.tokenizer import train_tokenizer

    if config.data.index is not None:
        skills_in(config.data)  # indexes the shards, before there are many ranks that need it
    return {"tokenizer": str(train_tokenizer(config.data, run.tokenizer, config.seed, config.model))}


def _pretrain(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    from megatron_ext.training.stage import run_supervised

    return run_supervised(config, "pretrain", run.root / "pretrain", config.pretrain.init_from, launch.ranks, launch.stop_file)


def _sft(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    from megatron_ext.training.stage import run_supervised

    init_from = config.sft.init_from or run.checkpoints("pretrain")
    return run_supervised(config, "sft", run.root / "sft", init_from, launch.ranks, launch.stop_file)


def _mpo(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    from megatron_ext.training.stage import run_supervised

    init_from = config.mpo.init_from or run.checkpoints("sft")
    return run_supervised(config, "mpo", run.root / "mpo", init_from, launch.ranks, launch.stop_file)


def _discover(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    if not config.model.num_experts:
        raise UserError("discover", "finds clusters of experts, and the model has none (model.num_experts = 0)", "leave this stage out")
    checkpoint = run.start_of_rl(config)
    with stop_on_signals(launch.stop_file) as stop:
        from megatron_ext.earl.clusters import discover, effects_in_words
        from megatron_ext.earl.files import write_clusters
        from megatron_ext.earl.span_information import with_spans
        from megatron_ext.inference.causal import run_causal_gate
        from megatron_ext.inference.survey import CONTROL, SPANS, Surveyed, run_discovery_survey
        from megatron_ext.observe.board import board_clusters

        def poll() -> None:
            if stop.asked:
                raise StoppedForRequeue("stopped after the last answer: run again to resume")

        survey = Surveyed.read(run_discovery_survey(config, checkpoint, run.discover, stop))
        clusters = discover(
            survey.mass("mass"),
            survey.skill_N,
            survey.template_N,
            config.discover,
            config.seed,
            control_NLE=survey.mass(CONTROL),
            checkpoint=str(checkpoint),
            poll=poll,
        )
        clusters = with_spans(clusters, {span: survey.mass(name) for span, name in SPANS.items()}, survey.skill_N, survey.template_N)
        if config.discover.causal_gate != "off":
            clusters = run_causal_gate(config, clusters, checkpoint, run.discover, stop)
        write_clusters(clusters, run.clusters)
        board_clusters(run.discover, run.clusters)
    for found in clusters.skills:
        print(f"  {found.skill:<10} {found.status:<9} {found.reason}{effects_in_words(found.pairs)}")
        if found.causal is not None and found.status == "ok":
            print(f"  {'':<10} {found.causal.verdict}: {found.causal.reason}")
    return {"clusters": {found.skill: found.status for found in clusters.skills}}


def _rl(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    from megatron_ext.rl.run import run_rl

    result = run_rl(config, run.root / "rl", run.start_of_rl(config), run.clusters, stop_file=launch.stop_file, nodes=launch.nodes)
    paid = {"earl": {name: getattr(config.earl, name) for name in ("mode", "combine", "control")}} if config.earl.enabled else {}
    return {**result, **paid}


def _evaluate_sft(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    return evaluate(config, run.start_of_rl(config), run.evaluation("sft"), run.clusters if config.model.num_experts else None, launch.stop_file)


def _evaluate_rl(config: RunConfig, run: RunFolder, launch: Launch) -> dict[str, Any]:
    return evaluate(config, run.checkpoints("rl"), run.evaluation("rl"), run.clusters if config.model.num_experts else None, launch.stop_file)


def evaluate(config: RunConfig, checkpoint: Path, out: Path, clusters: Path | None, stop_file: Path | None = None) -> dict[str, Any]:
    """Accuracy by skill of any checkpoint, written to `out`."""
    with stop_on_signals(stop_file) as stop:
        from megatron_ext.inference.evaluate import run_evaluation

        return run_evaluation(config, checkpoint, out, clusters, stop)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("tokenizer", (), ("data", "seed"), ("tokenizer",), _tokenizer),
        Stage("pretrain", ("tokenizer",), ("model", "pretrain"), ("pretrain",), _pretrain, supervised=True),
        Stage("sft", ("pretrain",), ("sft",), ("sft",), _sft, supervised=True),
        Stage("mpo", ("sft",), ("mpo",), ("mpo",), _mpo, supervised=True),
        Stage("discover", ("sft",), ("discover", "rollout", "rl.reward"), ("discover",), _discover),
        Stage("evaluate-sft", ("sft", "discover"), ("evaluate", "rollout", "rl.reward"), ("evaluate/sft", "evaluate/sft.json"), _evaluate_sft),
        Stage("rl", ("sft", "discover"), ("rl", "earl", "rollout"), ("rl",), _rl),
        Stage("evaluate-rl", ("rl", "discover"), ("evaluate", "rollout"), ("evaluate/rl", "evaluate/rl.json"), _evaluate_rl),
    )
}


def needs(stage: Stage, config: RunConfig) -> tuple[str, ...]:
    """The stages whose results this one reads. A stage that starts from a given checkpoint does not need the stages that would have made it, and a model
    without experts has no clusters. What comes after fine-tuning reads the last of its stages."""
    if (stage.name == "sft" and config.sft.init_from is not None) or (stage.name == "mpo" and config.mpo.init_from is not None):
        return ("tokenizer",)
    if stage.name in ("sft", "mpo"):
        return stage.needs
    names = stage.needs if config.model.num_experts else tuple(name for name in stage.needs if name != "discover")
    tuned = "tokenizer" if config.rl.init_from is not None else "mpo" if config.mpo.steps else "sft"
    return tuple(tuned if name == "sft" else name for name in names)


def require(stage: Stage, config: RunConfig) -> None:
    """Raises UserError for a stage that the recipe does not have."""
    if stage.name == "mpo" and not config.mpo.steps:
        raise UserError("mpo.steps", "is 0: the recipe has no such stage", "set it, for example mpo.steps=200")


def sections(stage: Stage, config: RunConfig) -> tuple[str, ...]:
    """The parts of the configuration that decide the result of a stage: its own and those of everything before it."""
    before = {section for name in needs(stage, config) for section in sections(STAGES[name], config)}
    slots = {"model.clvr.inject", "model.clvr.num_slots"} if config.model.clvr.slots else set()  # memory tokens are pieces of the tokenizer
    return tuple(sorted(before | set(stage.sections) | ({"model"} if stage.name != "tokenizer" else slots)))


def recipe(until: str | None, config: RunConfig) -> list[Stage]:
    """The stages that lead to `until`, in order; without it, all that lead to a comparison of before and after RL."""
    if until is not None and until not in STAGES:
        close = get_close_matches(until, list(STAGES), n=1)
        raise UserError("--until", f"there is no stage {until!r}", f"did you mean {close[0]}?" if close else f"use {', '.join(STAGES)}")
    if until is not None:
        require(STAGES[until], config)
    wanted = {until} if until is not None else {"evaluate-sft", "evaluate-rl"}
    for stage in reversed(STAGES.values()):
        if stage.name in wanted:
            wanted |= set(needs(stage, config))
    return [stage for stage in STAGES.values() if stage.name in wanted]
