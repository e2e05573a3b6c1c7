"""Plans of reinforcement learning: a layout for the learner, one for the rollout replicas, and how they share the devices. Without torch.

colocated       both on all devices, one after the other; their memory adds up
disaggregated   some devices learn, the others answer; each waits for the other in a synchronous run (`rl.max_staleness` 0)

step = answers + update + refit          `overlapped_s`, of a run that answers while it learns: max(answers, update) + refit
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_ext.config.schema import ParallelConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import Layout, check_rollout_layout
from megatron_ext.parallel.planner.layout_names import name_of
from megatron_ext.parallel.planner.rollouts import Answers, GenerationTimes, Replica, RolloutMemory, rank_numels, refit_s, replica_layout
from megatron_ext.parallel.planner.search import GIB, Found, Plans, Refusal, Search

LEARNERS = 24
"""How many of the fastest learner layouts are paired with rollouts."""


@dataclass(frozen=True)
class RolloutFound:
    """Replicas of one layout, `batch` rows a lane."""

    layout: Layout
    replicas: int
    batch: int
    memory: RolloutMemory
    times: GenerationTimes

    @property
    def name(self) -> str:
        return f"{self.replicas} x {name_of(self.layout) if self.layout.num_ranks > 1 else 'TP1'}"


@dataclass(frozen=True)
class FleetFound:
    """`learner_gpus` and `rollout_gpus` are the same devices where `colocated`."""

    colocated: bool
    learner_gpus: int
    rollout_gpus: int
    learner: Found
    rollout: RolloutFound
    refit_s: float
    tokens_per_s: float

    @property
    def step_s(self) -> float:
        return self.rollout.times.total_s + self.learner.times.total_s + self.refit_s

    @property
    def overlapped_s(self) -> float:
        return max(self.rollout.times.total_s, self.learner.times.total_s) + self.refit_s

    @property
    def gpus(self) -> int:
        return self.learner_gpus if self.colocated else self.learner_gpus + self.rollout_gpus


@dataclass(frozen=True)
class FleetPlans:
    found: list[FleetFound]
    refused: list[Refusal]


@dataclass(frozen=True)
class FleetSearch:
    """`search`: the learner's, on all devices."""

    search: Search
    answers: Answers

    def run(self) -> FleetPlans:
        total = self.search.cluster.gpus
        everywhere = self.search.run()
        replicas, of_replicas = self._replicas(total)
        found, refused = list(self._colocated(everywhere, replicas)), list(everywhere.refused)
        refused += of_replicas
        for learner_gpus in splits(total, self.search.cluster.per_node):
            learners = self.search.smaller(learner_gpus, everywhere.found, LEARNERS)
            found += list(self._disaggregated(learners, learner_gpus, replicas))
        if everywhere.found and not any(one.colocated for one in found):
            least = min(everywhere.found, key=lambda one: one.memory.total_bytes)
            refused.append(Refusal("colocated", self._no_room(least), len(everywhere.found)))
        return FleetPlans(sorted(found, key=lambda one: one.step_s), refused)

    def _colocated(self, plans: Plans, layouts: list[Layout]) -> Iterator[FleetFound]:
        total = self.search.cluster.gpus
        for learner in plans.found[:LEARNERS]:
            room = self.search.cluster.gpu.memory_bytes - learner.memory.total_bytes
            if rollout := self._best(layouts, total, room):
                yield self._joined(True, total, total, learner, rollout)

    def _disaggregated(self, learners: list[Found], learner_gpus: int, layouts: list[Layout]) -> Iterator[FleetFound]:
        rollout_gpus = self.search.cluster.gpus - learner_gpus
        rollout = self._best(layouts, rollout_gpus, self.search.cluster.gpu.memory_bytes)
        if rollout is not None:
            yield from (self._joined(False, learner_gpus, rollout_gpus, learner, rollout) for learner in learners)

    def _joined(self, colocated: bool, learner_gpus: int, rollout_gpus: int, learner: Found, rollout: RolloutFound) -> FleetFound:
        refit = refit_s(rollout.memory.weights_bytes, learner_gpus, rollout.replicas * rollout.layout.num_ranks, self.search.cluster)
        one = FleetFound(colocated, learner_gpus, rollout_gpus, learner, rollout, refit, 0.0)
        return replace(one, tokens_per_s=self.search.work.rows * self.search.work.mean_row_tokens / one.step_s)

    def _best(self, layouts: list[Layout], gpus: int, room: float) -> RolloutFound | None:
        """The fastest replicas on `gpus` devices with `room` bytes each."""
        options = [one for layout in layouts if gpus % layout.num_ranks == 0 and (one := self.rollout(layout, gpus // layout.num_ranks, room))]
        return min(options, key=lambda one: one.times.total_s) if options else None

    def rollout(self, layout: Layout, replicas: int, room: float) -> RolloutFound | None:
        """With as many rows as fit, at most `rollout.batch_size`; None where not one group of a prompt does."""
        samples = self.answers.samples
        rows = max(1, self.search.config.rollout.batch_size // samples) * samples
        while rows >= samples:
            replica = self._replica(layout, rows)
            memory = replica.memory()
            if memory.total_bytes <= room:
                return RolloutFound(layout, replicas, rows, memory, replica.times(replicas))
            fixed = replace(replica, batch=0).memory().total_bytes
            fits = int((room - fixed) / max(1.0, (memory.total_bytes - fixed) / rows)) // samples * samples
            rows = min(rows - samples, max(fits, 0))
        return None

    @cached_property
    def _numels(self) -> dict[Layout, tuple[int, int, int]]:
        return {}

    def _replica(self, layout: Layout, rows: int) -> Replica:
        if layout not in self._numels:
            self._numels[layout] = rank_numels(self.search.model, layout)
        return Replica(self.search.model, layout, self._numels[layout], rows, self.answers, self.search.cluster)

    def _replicas(self, gpus: int) -> tuple[list[Layout], list[Refusal]]:
        """Layouts of one replica, inside a node, and those that rules or memory refuse."""
        allowed, refused = [], []
        most = min(gpus, self.search.cluster.per_node)
        sizes = [size for size in range(1, most + 1) if most % size == 0]
        for tp in sizes:
            for ep in sizes:
                layout = replica_layout(tp, ep)
                problems = check_rollout_layout(self.search.model, ParallelConfig(num_ranks=layout.num_ranks, tp=tp, ep=ep))
                name = f"rollouts {name_of(layout) if layout.num_ranks > 1 else 'TP1'}"
                if problems:
                    if tp == 1 or ep == 1:
                        refused.append(Refusal(name, problems[0]))
                elif layout.num_ranks <= most and self.rollout(layout, 1, self.search.cluster.gpu.memory_bytes) is None:
                    refused.append(Refusal(name, self._too_large(layout)))
                elif layout.num_ranks <= most:
                    allowed.append(layout)
        return allowed, refused

    def _too_large(self, layout: Layout) -> UserError:
        samples, gpu = self.answers.samples, self.search.cluster.gpu
        memory = self._replica(layout, samples).memory()
        what = (
            f"a rank with the {samples} rows of one prompt needs {memory.total_bytes / GIB:.1f} GiB ({memory.weights_bytes / GIB:.1f} of weights, "
            f"{memory.cache_bytes / GIB:.1f} of keys and values) and {gpu.name} has {gpu.memory_bytes / GIB:.1f} GiB"
        )
        return UserError("rollout.parallel", what, "more tp or ep, or a smaller rollout.max_new_tokens")

    def _no_room(self, least: Found) -> UserError:
        gpu = self.search.cluster.gpu
        room = (gpu.memory_bytes - least.memory.total_bytes) / GIB
        what = f"the smallest learner ({least.name}) leaves {room:.1f} of {gpu.memory_bytes / GIB:.1f} GiB, which is too little for any rollout replica"
        return UserError("colocated", what, "split the devices between learner and rollouts")


def splits(gpus: int, per_node: int) -> list[int]:
    """Devices for the learner that are worth a try: eighths of all, by whole nodes where there are several."""
    unit = per_node if gpus >= 2 * per_node else 1
    shares = {gpus * eighth // 8 // unit * unit for eighth in (1, 2, 4, 6)}
    return sorted(share for share in shares if 0 < share < gpus)
