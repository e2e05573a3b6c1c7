"""Every layout that a learner can have on a number of devices, ranked by how much it trains a second; and why the others cannot be.

    axes that the model divides by (`plan.check_layout`) -> grids that fill the ranks -> batches that divide -> recompute and micro-batch that fit the memory
    -> seconds of a step -> ranked by tokens a second

The rules themselves are those that training checks: this module counts with plain numbers, because a thousand devices have thousands of layouts, and asks the
rules for the sentence whenever it refuses. Of every layout the fastest of what fits is kept: no recompute before attention before whole layers, and
micro-batches no larger than the configuration's.

Legal but not tried: cp above 16; etp other than 1 and tp; interleaving of other than the fastest pipelines, and other than vpp 2 and 4 and chunks of 1, 2 and 4
layers. `--why` judges these too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from megatron_ext.config.rules import check_rules
from megatron_ext.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import Layout, check_layout
from megatron_ext.parallel.planner.fit import Memory, Sizer
from megatron_ext.parallel.planner.hardware import Cluster, Gpu
from megatron_ext.parallel.planner.layout_names import RECOMPUTE, name_of, sizes_of
from megatron_ext.parallel.planner.times import StepTimes, Timer
from megatron_ext.parallel.planner.work import Held, held_by
from megatron_ext.parallel.planner.workload import Workload
from megatron_ext.shapes import round_up

MOST_TP, MOST_CP = 16, 16
INTERLEAVED = 48
"""How many of the fastest pipelines are tried interleaved."""
SMALLER = 300
"""How many of the fastest layouts are tried on fewer devices."""
GIB = 2**30


@dataclass(frozen=True)
class Found:
    """A layout that fits, and what is predicted of it. `tokens_per_s` of all devices."""

    layout: Layout
    recompute: str
    micro_rows: int
    memory: Memory
    times: StepTimes
    tokens_per_s: float

    @property
    def name(self) -> str:
        return name_of(self.layout)


@dataclass(frozen=True)
class Refusal:
    """A family of layouts with something in common that cannot be, and how many were met. `memory`: of the one that needs the least, where memory refuses."""

    family: str
    error: UserError
    layouts: int = 1
    memory: Memory | None = None


@dataclass(frozen=True)
class Plans:
    found: list[Found]
    refused: list[Refusal]


@dataclass(frozen=True)
class Search:
    """What is asked: a stage of a configuration on a cluster. `only`: axes that are given; `recompute`: what may be computed again."""

    config: RunConfig
    work: Workload
    cluster: Cluster
    only: Mapping[str, int] = field(default_factory=dict)
    recompute: tuple[str, ...] = RECOMPUTE

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    @cached_property
    def overlaps(self) -> bool:
        """On GPUs, unless the configuration says no."""
        asked = self.config.parallel.overlap_grad_reduce
        return self.cluster.gpu.fused_kernels if asked is None else asked

    @cached_property
    def sizer(self) -> Sizer:
        return Sizer(self.model, self.work, self.cluster.gpu, self.overlaps, self.config.parallel.recompute_layers)

    @cached_property
    def timer(self) -> Timer:
        return Timer(self.model, self.work, self.cluster, self.overlaps)

    @cached_property
    def _held(self) -> dict[tuple[int, int], list[tuple[Held, int]]]:
        return {}

    def on(self, gpus: int) -> Search:
        """The same question for other numbers of devices; what was computed for one serves the other."""
        return self._sharing(replace(self.cluster, gpus=gpus), "sizer", "timer", "_held")

    def timed_by(self, gpu: Gpu) -> Search:
        """The same question where only the times of the devices are others."""
        return self._sharing(replace(self.cluster, gpu=gpu), "sizer", "_held")

    def _sharing(self, cluster: Cluster, *names: str) -> Search:
        other = replace(self, cluster=cluster)
        for shared in names:
            other.__dict__[shared] = getattr(self, shared)
        return other

    def run(self) -> Plans:
        """All layouts, the fastest first."""
        refused = _Refused()
        found = [result for layout in self._grids(refused) if (result := self._best(layout, refused))]
        found.sort(key=_slowness)
        if "vpp" not in self.only:
            for one in [one for one in found if one.layout.pp > 1][:INTERLEAVED]:
                layouts = [replace(one.layout, vpp=vpp) for vpp in self._interleavings(one.layout.pp)]
                found += [result for layout in layouts if (result := self._best(layout, refused))]
        return Plans(sorted(found, key=_slowness), refused.families())

    def smaller(self, gpus: int, found: Sequence[Found], count: int) -> list[Found]:
        """The first `count` of layouts found here that can also be on fewer devices, where data parallelism is all that shrinks and memory only grows; the
        fastest first."""
        other, kept = self.on(gpus), list[Found]()
        for one in found[:SMALLER]:
            layout = one.layout
            if gpus % (layout.tp * layout.cp * layout.pp) or gpus // layout.pp % (layout.ep * layout.etp):
                continue
            result = other._best(replace(layout, dp=gpus // (layout.tp * layout.cp * layout.pp), num_ranks=gpus), _Refused())
            kept += [result] if result else []
            if len(kept) == count:
                break
        return sorted(kept, key=_slowness)

    def judge(self, layout: Layout, recompute: str | None = None, micro_rows: int | None = None) -> Found | list[UserError]:
        """One layout: what is predicted of it, or everything that refuses it. Unlike `run` it judges layouts that would not be tried."""
        rows = [micro_rows] if micro_rows else self.micro_rows(layout)
        if problems := self.problems(layout, rows[0] if rows else self.work.micro_rows):
            return problems
        refused = _Refused()
        result = self._best(layout, refused, (recompute,) if recompute else self.recompute, rows)
        return result or [refusal.error for refusal in refused.families()]

    def problems(self, layout: Layout, micro_rows: int) -> list[UserError]:
        """What the rules of the configuration say about a layout; memory is not their business."""
        parallel = parallel_of(self.config.parallel, layout)
        settings = getattr(self.config, self.work.stage).model_copy(update={"micro_batch": micro_rows})
        config = self.config.model_copy(update={"parallel": parallel, self.work.stage: settings})
        own = (f"{self.work.stage}.", "model.", "parallel.")
        return check_layout(self.model, parallel) + [problem for problem in check_rules(config) if problem.where.startswith(own)]

    def micro_rows(self, layout: Layout) -> list[int]:
        """Rows of a micro-batch that the layout allows, the most first, none above the configuration's."""
        share, rest = divmod(self.work.per_update(), layout.dp)
        if rest:
            return []
        most = min(self.work.micro_rows, share)
        if self.work.micro_tokens:
            return self._by_tokens(layout, share, most)
        if self.work.stage == "rl":
            return [most >> shift for shift in range(most.bit_length())] if layout.vpp == 1 or share >= layout.pp else []
        return [rows for rows in range(most, 0, -1) if share % rows == 0 and (layout.vpp == 1 or share // rows % layout.pp == 0)]

    def _by_tokens(self, layout: Layout, share: int, most: int) -> list[int]:
        """Rows of a micro-batch when a rank's are spread evenly over as few as hold them; none where the rules of a budget refuse the layout."""
        group = layout.pp if layout.vpp > 1 else 1
        if share % group or round_up(self.config.data.max_length, layout.length_multiple) > self.work.micro_tokens:
            return []
        return [-(-share // round_up(-(-share // most), group))]

    def evaluate(self, layout: Layout, recompute: str, micro_rows: int, memory: Memory) -> Found:
        times = self.timer.step(layout, self._ranks(layout), recompute, micro_rows, self.sizer.numels(layout, memory.rank))
        return Found(layout, recompute, micro_rows, memory, times, self.work.rows * self.work.mean_row_tokens / times.total_s)

    def _ranks(self, layout: Layout) -> list[tuple[Held, int]]:
        key = layout.pp, layout.vpp
        if key not in self._held:
            stages = self.sizer.stages(layout)
            held = (held_by(stages[rank :: layout.pp], self.sizer.layers(layout, rank)) for rank in range(layout.pp))
            self._held[key] = list(Counter(held).items())
        return self._held[key]

    def _best(self, layout: Layout, refused: _Refused, recompute: tuple[str, ...] | None = None, rows: list[int] | None = None) -> Found | None:
        """The fastest recompute and micro-batch that fit; with a refusal noted where none does."""
        rows = self.micro_rows(layout) if rows is None else rows
        if not rows:
            refused.batch(self, layout)
            return None
        kinds, limit, sizer = recompute or self.recompute, self.cluster.gpu.memory_bytes, self.sizer
        likely, least = sizer.fullest(layout, kinds[-1], rows[-1], limit)
        if least > limit:
            refused.memory(self, layout, least, lambda: sizer.of_rank(layout, likely, kinds[-1], rows[-1]))
            return None
        found: list[Found] = []
        for kind in kinds:
            for count in rows:
                if sizer.exceeds(layout, likely, kind, count, limit):
                    continue
                rank, need = sizer.fullest(layout, kind, count, limit)
                if need <= limit:
                    found.append(self.evaluate(layout, kind, count, sizer.of_rank(layout, rank, kind, count)))
                    break
            if found and found[-1].micro_rows == rows[0]:
                break
        return max(found, key=lambda one: one.tokens_per_s)

    def _grids(self, refused: _Refused) -> Iterator[Layout]:
        """Layouts that the rules of grids allow, without interleaving unless it is asked for."""
        total = self.cluster.gpus
        axes = {axis: self._axis(axis, refused) for axis in ("tp", "cp", "pp", "ep", "etp")}
        for pp in axes["pp"]:
            stage_ranks = total // pp
            for tp in axes["tp"]:
                for cp in axes["cp"]:
                    if stage_ranks % (tp * cp):
                        continue
                    dp = stage_ranks // (tp * cp)
                    for ep, etp in self._expert_grids(axes, tp, stage_ranks, pp, refused):
                        yield Layout(tp, tp > 1, pp, self.only.get("vpp", 1), cp, ep, etp, dp, total)

    def _expert_grids(self, axes: Mapping[str, list[int]], tp: int, stage_ranks: int, pp: int, refused: _Refused) -> Iterator[tuple[int, int]]:
        """(ep, etp); of a model without experts the one that follows from tp."""
        if not self.model.num_experts:
            yield from [(1, tp)] if axes["ep"] and axes["etp"] else []
            return
        for ep in axes["ep"]:
            for etp in [self.only["etp"]] if "etp" in self.only else sorted({1, tp} if ep > 1 else {tp}):
                if etp not in axes["etp"] or (ep == 1 and etp != tp):
                    continue
                if stage_ranks % (ep * etp):
                    refused.grid(self, tp, pp, ep, etp)
                else:
                    yield ep, etp

    def _interleavings(self, pp: int) -> list[int]:
        """Worth a try: chunks of one, two or four layers, and vpp 2 and 4."""
        layers = self.model.num_layers
        even = {layers // (pp * chunk) for chunk in (1, 2, 4) if layers % (pp * chunk) == 0} - {1}
        return sorted(even | {vpp for vpp in (2, 4) if pp * vpp <= layers and (not even or layers % (pp * vpp) == 0)})

    def _axis(self, axis: str, refused: _Refused) -> list[int]:
        """Sizes of one axis that the model can be split by, if the others are 1."""
        total, model = self.cluster.gpus, self.model
        experts = {"ep": 2 * model.num_experts, "etp": MOST_TP} if model.num_experts else {"ep": 1, "etp": 1}
        most = ({"tp": MOST_TP, "cp": MOST_CP, "pp": 2 * model.num_layers} | experts)[axis]
        sizes = [self.only[axis]] if axis in self.only else [size for size in range(1, min(total, most) + 1) if total % size == 0]
        allowed = []
        for size in sizes:
            trial = {"num_ranks": 2 * size, "ep": 2, "etp": size} if axis == "etp" else {"num_ranks": size, axis: size}
            problems = [problem for problem in check_layout(model, ParallelConfig(**trial)) if problem.where == f"parallel.{axis}"]
            if problems:
                refused.axis(axis, size, problems[0])
            elif total % size:
                refused.axis(axis, size, UserError(f"parallel.{axis}", f"{size} does not divide --gpus {total}", "use one of its divisors"))
            else:
                allowed.append(size)
        return allowed


def _slowness(one: Found) -> tuple[float, int]:
    """By speed, and at equal speed by memory."""
    return -one.tokens_per_s, one.memory.total_bytes


def parallel_of(base: ParallelConfig, layout: Layout, recompute: str | None = None) -> ParallelConfig:
    """The section of the configuration that asks for this layout."""
    return base.model_copy(update={**sizes_of(layout), "num_ranks": layout.num_ranks} | ({} if recompute is None else {"recompute": recompute}))


def memory_error(memory: Memory, cluster: Cluster, has_experts: bool) -> UserError:
    """Both numbers, the largest part, and what would shrink it."""
    parts = {name.removesuffix("_bytes"): getattr(memory, name) for name in Memory.__dataclass_fields__ if name not in ("rank", "host_bytes", "context_bytes")}
    largest = max(parts, key=parts.__getitem__)
    remedies = {
        "logits": "split the vocabulary (tp) or the sequence (cp)",
        "decoder": "recompute, split the sequence (tp, cp), or shorten rows",
        "vision": "freeze the ViT (train_vision=false), or show fewer tiles a micro-batch",
        "clvr": "split the sequence (cp), or show fewer tiles a micro-batch",
        "workspace": "shorten rows or micro-batches, or split the sequence (tp, cp)",
        "inputs": "spread the rows over more ranks (dp)",
    }
    need, have = memory.total_bytes / GIB, cluster.gpu.memory_bytes / GIB
    largest_part = f"the most goes to {largest} ({parts[largest] / GIB:.1f} GiB)"
    what = f"pipeline rank {memory.rank} needs {need:.1f} GiB and {cluster.gpu.name} has {have:.1f} GiB; {largest_part}"
    spread = "the experts (ep), the layers (pp) or the tensors (tp)" if has_experts else "the layers (pp) or the tensors (tp)"
    return UserError("memory", what, remedies.get(largest, f"spread {spread} over more ranks"))


class _Refused:
    """Refusals by family, each with the sentence of the first that was met, or of the one that memory nearly let pass."""

    def __init__(self) -> None:
        self._families: dict[str, Refusal] = {}

    def families(self) -> list[Refusal]:
        return list(self._families.values())

    def axis(self, axis: str, size: int, error: UserError) -> None:
        self._note(f"{axis.upper()}{size}", error)

    def grid(self, search: Search, tp: int, pp: int, ep: int, etp: int) -> None:
        name = "x".join(f"{axis}{size}" for axis, size in (("PP", pp), ("EP", ep), ("ETP", etp)) if size > 1)
        if name not in self._families:
            parallel = ParallelConfig(num_ranks=search.cluster.gpus, tp=tp, pp=pp, ep=ep, etp=etp)
            self._note(name, next(problem for problem in check_layout(search.model, parallel) if problem.where == "parallel.ep"))
        else:
            self._note(name, self._families[name].error)

    def batch(self, search: Search, layout: Layout) -> None:
        name = f"DP{layout.dp}" + (f"xPP{layout.pp}xVPP" if layout.vpp > 1 and search.work.per_update() % layout.dp == 0 else "")
        error = self._families[name].error if name in self._families else search.problems(layout, search.work.micro_rows)[0]
        self._note(name, error)

    def memory(self, search: Search, layout: Layout, need_bytes: float, memory: Callable[[], Memory]) -> None:
        """`memory` is asked for only where it is the family's smallest."""
        words = (("TP", layout.tp), ("PP", layout.pp), ("EP", layout.ep), ("ETP", layout.etp if layout.etp != layout.tp or layout.ep > 1 else 1))
        name = "x".join(f"{axis}{size}" for axis, size in words if size > 1) or "DP"
        known = self._families.get(name)
        if known is not None and known.memory is not None and known.memory.total_bytes <= need_bytes:
            self._note(name, known.error)
            return
        smallest, count = memory(), known.layouts + 1 if known is not None else 1
        self._families[name] = Refusal(name, memory_error(smallest, search.cluster, search.model.num_experts > 0), count, smallest)

    def _note(self, name: str, error: UserError) -> None:
        known = self._families.get(name)
        self._families[name] = Refusal(name, error, 1 if known is None else known.layouts + 1, None if known is None else known.memory)
