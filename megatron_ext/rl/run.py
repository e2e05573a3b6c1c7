"""The reinforcement-learning stage, from a configuration to a folder that holds its result.

    stage_dir/  metrics.jsonl   rollouts/ (the bank, `bank/bank.py`)   ranks.json   checkpoints/step_.../   earl_{sigma,guard}.json   drift.jsonl, drift/

    tokenizer, clusters -> learner and replicas (Ray actors or local processes) -> stream -> loop -> metrics, rollouts, checkpoints

Running the stage again continues it from its latest checkpoint, with every answer that was given since. A replica that is lost is replaced while the others go
on (`fleet.py`); a learner that is lost is started again from the checkpoint, here. A check that fails ends the stage with an error that names it. Ctrl-C and
SIGTERM end it after the step, with a checkpoint; a second Ctrl-C at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_ext.checkpoint.dist import latest_step
from megatron_ext.checkpoint.folder import CHECKPOINTS
from megatron_ext.checkpoint.saver import waiting_for_saves
from megatron_ext.config.schema import RunConfig
from megatron_ext.data.tokenizer import Tokenizer, load_tokenizer
from megatron_ext.earl.clusters import ExpertClusters
from megatron_ext.earl.files import read_paid_clusters
from megatron_ext.errors import LearnerLost, RankFailed, StoppedForRequeue, UserError
from megatron_ext.observe.metrics_file import read_metrics
from megatron_ext.observe.observer import Observer, Report, observe_stage
from megatron_ext.observe.stopwatch import TIMING, Stopwatch
from megatron_ext.parallel.stopping import stop_on_signals
from megatron_ext.rl.bank.bank import ROLLOUTS, Bank, open_bank
from megatron_ext.rl.census import Census
from megatron_ext.rl.conversations import Rules
from megatron_ext.rl.conversing import ConversingFleet
from megatron_ext.rl.credit import Credit, ReferenceKl
from megatron_ext.rl.deadlines import DEADLINES, Deadlines
from megatron_ext.rl.environments import EnvironmentPool
from megatron_ext.rl.fleet import MegatronFleet
from megatron_ext.rl.hosts.ranks import Host
from megatron_ext.rl.hosts.ray_node import Nodes
from megatron_ext.rl.hosts.switchboard import Switchboard
from megatron_ext.rl.learners import MegatronLearner
from megatron_ext.rl.loop import Recipe, StepReport, run_loop
from megatron_ext.rl.questions import questions, validate
from megatron_ext.rl.record import Recorder
from megatron_ext.rl.reestimation import ClusterWatch, WatchedCredit
from megatron_ext.rl.roles import Metrics
from megatron_ext.rl.router_goals import watches_routers
from megatron_ext.rl.scoring.pool import RewardPool
from megatron_ext.rl.stream import Stream
from megatron_ext.rl.turns import Turns

LAST_SAVE_S = 60.0
"""How long an error waits for the checkpoint that is being saved: a learner that is lost will not finish it."""


@dataclass(frozen=True)
class Stage:
    """What a run of the loop is made of; all but the learner's processes outlives the loss of one."""

    config: RunConfig
    observer: Observer
    learner: MegatronLearner
    fleet: MegatronFleet
    stream: Stream
    credit: Credit | WatchedCredit
    recorder: Recorder
    tokenizer: Tokenizer


def run_rl(
    config: RunConfig,
    stage_dir: Path,
    sft_checkpoint: Path,
    clusters: Path | None,
    deadlines: Deadlines = DEADLINES,
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
    bank = open_bank(stage_dir / ROLLOUTS)
    with (
        observe_stage(config.observe, config.name, "rl", config.rl.steps, stage_dir) as observer,
        RewardPool.under(config.rl.reward, config.rl) as scorer,
        EnvironmentPool.under(config.rl.environment, config.rl) if config.rl.environment else nullcontext() as environment,
        questions(config, tokenizer, bank.images) as asked,
        open_host(config, nodes) as host,
        stop_on_signals(stop_file) as stop,
    ):
        board = Switchboard(host, observer.fleet, config.rl.silence_s, Census(stage_dir, host))
        turns = Turns(board, deadlines.sync_s, config.rl.offload)
        learner = MegatronLearner(board, config, stage_dir, sft_checkpoint, tokenizer.pad_id, deadlines, turns)
        fleet = MegatronFleet(board, config, deadlines, turns)  # starts beside the learner
        learner.wait_open()
        fleet.wait_open()
        if stop.asked:
            raise StoppedForRequeue(f"stopped before step {learner.finished_steps + 1}: run again to resume")
        if config.observe.profile:
            learner.profile()
            fleet.profile(stage_dir, config.rl.steps - learner.finished_steps)
        answering = fleet if environment is None else ConversingFleet(fleet, environment.act, Rules.of(config, tokenizer))
        ahead = config.rl.max_staleness
        whole_draws = ahead == 0 and not config.rollout.deterministic
        stream = Stream(asked, answering, scorer, bank, ahead, whole_draws)
        if ahead:
            learner.meanwhile = partial(stream.turn, beside_update=True)
        credit = _credit(config, found, tokenizer, bank, stage_dir, learner.reference_kl if pays_for_kl else None)
        if credit.earl is not None:
            learner.goals, fleet.drawn_layers = credit.goals if watches_routers(config) else None, credit.earl.drawn_layers()
        stage = Stage(config, observer, learner, fleet, stream, credit, Recorder(bank, sum(ranks_of(config).values())), tokenizer)
        restarts, lost = Restarts(config.rl.restarts), False
        while True:
            try:
                if lost:
                    learner.restart()
                return _improve(stage, lambda: stop.asked)
            except LearnerLost as loss:
                restarts.spend(loss, learner.finished_steps)
                lost = True


def ranks_of(config: RunConfig) -> dict[str, int]:
    """Processes of the learner and of all replicas, by the role that their names begin with."""
    return {"learner": config.parallel.num_ranks, "rollout": config.rollout.replicas * config.rollout.parallel.num_ranks}


def _improve(stage: Stage, stop_requested: Callable[[], bool]) -> Metrics:
    """From the learner's latest checkpoint to the last step."""
    steps, learner = stage.config.rl.steps, stage.learner
    with stage.observer.steps(learner.finished_steps, ("reward/mean", "reward")) as publish:
        recipe = Recipe(
            steps=steps,
            credit=stage.credit,
            save_every=stage.config.rl.save_every,
            after_step=lambda report: after_step(report, stage, publish),
            stop_requested=stop_requested,
        )
        with waiting_for_saves(learner.finish_saving, lambda: learner.finish_saving(LAST_SAVE_S)):
            run_loop(recipe, stage.stream, learner, learner.finished_steps)
    return {**stage.recorder.last, "step": float(steps)}


class Restarts:
    """How often a learner may be started again without having got further."""

    def __init__(self, most: int) -> None:
        self._most, self._left, self._furthest = most, most, -1

    def spend(self, lost: LearnerLost, finished_steps: int) -> None:
        """Raises RankFailed where there is none left."""
        if finished_steps > self._furthest:
            self._furthest, self._left = finished_steps, self._most
        if self._left == 0:
            raise RankFailed(f"the learner was lost {self._most + 1} times at step {finished_steps + 1}, the last time so: {lost}") from lost
        self._left -= 1
        print(f"the learner is started again from its latest checkpoint: {lost}", flush=True)


def _clusters(config: RunConfig, path: Path | None) -> ExpertClusters | None:
    if not config.earl.enabled:
        return None
    if path is None:
        raise UserError("earl.enabled", "is true, but there are no expert clusters", "run `discover` first, or set earl.enabled=false")
    return read_paid_clusters(path, config)


def _credit(
    config: RunConfig, found: ExpertClusters | None, tokenizer: Tokenizer, bank: Bank, stage_dir: Path, kl: ReferenceKl | None
) -> Credit | WatchedCredit:
    def of(clusters: ExpertClusters | None) -> Credit:
        return Credit(config, clusters, tokenizer.tag_ids, stage_dir, kl)

    if found is None or not config.earl.reestimate_every:
        return of(found)
    return WatchedCredit(of, ClusterWatch(config, found, bank, stage_dir, tokenizer.image_id))


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

        with ray_host(ranks_of(config), config.rl.placement, nodes) as host:
            yield host


def after_step(report: StepReport, stage: Stage, publish: Report) -> None:
    """Validates where it is time to, records, and draws the step: the loop's own track lies above those of the ranks."""
    clock = Stopwatch()
    found = validate(report.step + 1, stage.config, stage.fleet, stage.tokenizer)
    clock.lap("evaluate")
    stage.recorder(report, {**found, TIMING + "evaluate": clock.phases()["evaluate"]} if found else {}, publish)
    stage.observer.trace_loop(report.step + 1, [*report.laps, *(clock.laps if found else ())])
