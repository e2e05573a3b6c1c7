"""The reinforcement-learning stage, from a configuration to a folder that holds its result.

    stage_dir/  metrics.jsonl   rollouts/   checkpoints/step_.../   earl_sigma.json

    tokenizer, clusters -> fleet (Ray actors or local processes) -> loop -> metrics, rollouts, checkpoints

Running the stage again continues it from its latest checkpoint. A rank that dies, or a check that fails, ends the stage with an error that names it; it can
then be run again. Ctrl-C and SIGTERM end it after the step, with a checkpoint; a second Ctrl-C at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from megatron_ext.batch import Prompt, Rollout
from megatron_ext.checkpoint.dist import latest_step
from megatron_ext.checkpoint.folder import CHECKPOINTS
from megatron_ext.checkpoint.saver import waiting_for_saves
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.prompts import draw_recorded_prompts, draw_skills
from megatron_ext.data.rewards import correctness
from megatron_ext.data.suite import ALL_SKILLS, SKILLS, draw_prompts
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.files import read_clusters
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.inference.sampling import rollout_seed
from megatron_ext.observe.metrics_file import read_metrics
from megatron_ext.observe.observer import Observer, observe_stage
from megatron_ext.observe.stopwatch import TIMING, Stopwatch
from megatron_ext.parallel.stopping import stop_on_signals
from megatron_ext.rl import fleet as fleets
from megatron_ext.rl.credit import Credit
from megatron_ext.rl.hosts.ranks import Host, Switchboard
from megatron_ext.rl.hosts.ray_node import Nodes
from megatron_ext.rl.loop import Recipe, StepReport, run_loop
from megatron_ext.rl.record import Recorder
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.sampling import keep_all, keep_differing
from megatron_ext.rl.scoring.pool import RewardPool

VALIDATION_SEED = 1
LAST_SAVE_S = 60.0
"""How long an error waits for the checkpoint that is being saved: a learner that is lost will not finish it."""


def run_rl(
    config: RunConfig,
    stage_dir: Path,
    sft_checkpoint: Path,
    clusters: Path | None,
    deadlines: fleets.Deadlines = fleets.DEADLINES,
    stop_file: Path | None = None,
    nodes: Nodes | None = None,
) -> Metrics:
    """Improves `sft_checkpoint` for `config.rl.steps` steps. Returns the last metrics and `step`. Raises StoppedForRequeue when a signal stopped it, or
    `stop_file` appeared.

    `clusters` is `expert_clusters.json`; with `earl.enabled` it must be there and of this model. Without `nodes` all ranks are on this machine.
    """
    if (latest_step(stage_dir / CHECKPOINTS) or -1) >= config.rl.steps:
        return read_metrics(stage_dir)[-1]
    found = _clusters(config, clusters)
    tokenizer = load_tokenizer(config.tokenizer_dir)
    stage_dir.mkdir(parents=True, exist_ok=True)
    pays_for_kl = config.rl.kl_coeff > 0 and config.rl.kl_placement == "reward"
    with (
        observe_stage(config.observe, config.name, "rl", config.rl.steps, stage_dir) as observer,
        RewardPool.under(config.rl.reward, config.rl) as scorer,
        open_host(config, nodes) as host,
        stop_on_signals(stop_file) as stop,
    ):
        fleet, learner = fleets.start(Switchboard(host, observer.fleet), config, stage_dir, sft_checkpoint, tokenizer.pad_id, deadlines)
        first = learner.finished_steps
        if stop.asked:
            raise StoppedForRequeue(f"stopped before step {first + 1}: run again to resume")
        with observer.steps(first, ("reward/mean", "reward")) as publish:
            record = Recorder(stage_dir, publish, fleets.num_ranks(config))
            recipe = Recipe(
                steps=config.rl.steps,
                samples=config.rl.rollouts_per_prompt,
                draw=lambda step: prompts_of_step(step, config, tokenizer),
                credit=Credit(config, found, tokenizer.tag_ids, stage_dir, learner.reference_kl if pays_for_kl else None),
                choose=partial(keep_differing, wanted=config.rl.prompts_per_step) if config.rl.dynamic_sampling else keep_all,
                draws=max(1, config.rl.dynamic_sampling),
                save_every=config.rl.save_every,
                after_step=lambda report: after_step(report, record, observer, config, fleet, tokenizer),
                stop_requested=lambda: stop.asked,
            )
            with waiting_for_saves(learner.finish_saving, lambda: learner.finish_saving(LAST_SAVE_S)):
                run_loop(recipe, fleet, scorer, learner, first)
    return {**record.last, "step": float(config.rl.steps)}


def _clusters(config: RunConfig, path: Path | None) -> ExpertClusters | None:
    if not config.earl.enabled:
        return None
    if path is None:
        raise UserError("earl.enabled", "is true, but there are no expert clusters", "run `discover` first, or set earl.enabled=false")
    return read_clusters(path, config.model)


@contextmanager
def open_host(config: RunConfig, nodes: Nodes | None = None) -> Iterator[Host]:
    """Where the ranks live."""
    if config.rl.fleet == "local" and nodes is not None:
        raise UserError("rl.fleet", f"local cannot reach {len(nodes.addresses)} nodes", "use ray, or one node")
    if config.rl.fleet == "local":
        from megatron_ext.rl.hosts.local_host import local_host

        with local_host() as host:
            yield host
    else:
        from megatron_ext.rl.hosts.ray_host import ray_host

        with ray_host(fleets.num_ranks(config), nodes) as host:
            yield host


def prompts_of_step(step: int, config: RunConfig, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a step, a function of (seed, step); from `rl.steps` on, those that dynamic sampling asks besides. Of the suite: skills by `rl.mix` (`qa`
    shared equally by the single skills), never the same prompt in two steps. Of files: their train split, in an order of its own each epoch."""
    start = step * config.rl.prompts_per_step
    if config.data.kind != "suite":
        return draw_recorded_prompts("train", config.rl.prompts_per_step, config.seed, config.data, tokenizer, config.model.vision, start)
    prompts = []
    for skill, count in skill_counts(step, config).items():
        prompts += draw_prompts("train", [skill], count, config.seed, config.data, tokenizer, config.model.vision, start)
    order = np.random.default_rng(rollout_seed(config.seed, "order", step)).permutation(len(prompts))
    return [prompts[index] for index in order]


def skill_counts(step: int, config: RunConfig) -> dict[str, int]:
    """How many prompts of each skill: they sum to `prompts_per_step`, and over steps each skill gets its share exactly on average (systematic sampling)."""
    qa, composite = config.rl.mix.get("qa", 0.0), config.rl.mix.get("composite", 0.0)
    weights = np.array([qa / len(SKILLS)] * len(SKILLS) + [composite])
    edges = np.concatenate([[0.0], np.cumsum(weights / weights.sum())]) * config.rl.prompts_per_step
    offset = np.random.default_rng(rollout_seed(config.seed, "mix", step)).random()
    counts = np.diff(np.floor(edges + offset + 1e-9)).astype(int)
    return dict(zip(ALL_SKILLS, counts.tolist(), strict=True))


def after_step(report: StepReport, record: Recorder, observer: Observer, config: RunConfig, fleet: fleets.MegatronFleet, tokenizer: Tokenizer) -> None:
    """Validates where it is time to, records, and draws the step: the loop's own track lies above those of the ranks."""
    clock = Stopwatch()
    found = validate(report.step + 1, config, fleet, tokenizer)
    clock.lap("evaluate")
    record(report, {**found, TIMING + "evaluate": clock.phases()["evaluate"]} if found else {})
    observer.trace_loop(report.step + 1, [*report.laps, *(clock.laps if found else ())])


def validate(finished: int, config: RunConfig, fleet: fleets.MegatronFleet, tokenizer: Tokenizer) -> Metrics:
    """`val/val/<skill>/accuracy`: greedy answers on the validation split, every `eval_every` steps."""
    every = config.rl.eval_every
    if not every or finished % every:
        return {}
    prompts = draw_skills("val", config.evaluate.prompts_per_skill, VALIDATION_SEED, config.data, tokenizer, config.model.vision)
    correct = correctness(config.rl.reward, config.earl.correct_threshold)
    verdicts: dict[str, list[bool]] = {}
    for answer in fleet.generate(prompts, 1, finished, greedy=True):
        right = isinstance(answer, Rollout) and correct(answer.prompt, answer.text)
        verdicts.setdefault(answer.prompt.skill, []).append(right)
    return {f"val/val/{skill}/accuracy": sum(right) / len(right) for skill, right in verdicts.items()}
