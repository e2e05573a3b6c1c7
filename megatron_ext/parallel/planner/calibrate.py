"""Fits the free constants of a device type to finished runs: MFU, link efficiency, latency, overhead of a layer and of a step. Without torch.

run folder: config.yaml + <stage>/metrics.jsonl  ->  layout, workload as it really was, median seconds of a step
seconds = x_0 + x_1 / mfu + x_2 / link_efficiency + x_3 node_latency_s + x_4 layer_overhead_s + x_5 step_overhead_s         x_i: the formulas of `times.py`
-> least squares of relative errors, all constants positive, over the subsets of constants that leave at least one run over; what is not fitted stays as it was

What a fit is worth is seen on layouts that it did not see: `Measured.held_out_s`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from operator import mul
from pathlib import Path

from megatron_ext.config.load import load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.observe.metrics_file import FILE_NAME, POSITIONS_PER_ROW, STEP_S, TILES_PER_ROW, Record, read_metrics
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.fit import Memory
from megatron_ext.parallel.planner.hardware import Cluster, Gpu
from megatron_ext.parallel.planner.layout_names import name_of
from megatron_ext.parallel.planner.search import Search
from megatron_ext.parallel.planner.workload import Assumed, Workload, workload

CONSTANTS = ("mfu", "link_efficiency", "node_latency_s", "layer_overhead_s", "step_overhead_s")
_INVERSE = ("mfu", "link_efficiency")
_NEVER = 1e30


@dataclass(frozen=True)
class Measured:
    """A stage of a finished run: `measured_s`, the median of its steps, and what the formulas say of it. `held_out_s`: with constants fitted to the runs of
    other layouts alone; None where there are none."""

    name: str
    measured_s: float
    predicted_s: float
    held_out_s: float | None


@dataclass(frozen=True)
class Fitted:
    """The type with its fitted constants, and the runs they were fitted to."""

    gpu: Gpu
    constants: tuple[str, ...]
    runs: tuple[Measured, ...]

    def yaml(self) -> str:
        """A fragment for --gpus-file."""
        names = [*self.constants, *(["network_latency_s"] if "node_latency_s" in self.constants else [])]
        lines = [f"    {name}: {getattr(self.gpu, name):.6g}" for name in names]
        return "\n".join(["gpus:", f"  {self.gpu.name}: # fitted; the other fields as before", *lines])


@dataclass(frozen=True)
class Run:
    """A stage of a finished run, as the formulas see it."""

    name: str
    search: Search
    layout: Layout
    recompute: str
    measured_s: float

    @cached_property
    def memory(self) -> Memory:
        return self.search.sizer.memory(self.layout, self.recompute, self.micro_rows)

    @cached_property
    def micro_rows(self) -> int:
        return self.search.micro_rows(self.layout)[0]

    @cached_property
    def _parts(self) -> dict[tuple[str, ...], tuple[float, list[float]]]:
        return {}

    def parts(self, chosen: tuple[str, ...]) -> tuple[float, list[float]]:
        """Seconds without what the chosen constants cost, and the seconds that each of them, or its inverse, is multiplied by."""
        if chosen not in self._parts:
            gpu = self.search.cluster.gpu
            nothing = {name: _NEVER if name in _INVERSE else 0.0 for name in chosen}
            base = self.predicted_s(gpu.model_copy(update=nothing))
            self._parts[chosen] = base, [self.predicted_s(gpu.model_copy(update={**nothing, name: 1.0})) - base for name in chosen]
        return self._parts[chosen]

    def predicted_s(self, gpu: Gpu) -> float:
        return self.search.timed_by(gpu).evaluate(self.layout, self.recompute, self.micro_rows, self.memory).times.total_s


def calibrate(folders: Sequence[Path], gpu: Gpu) -> Fitted:
    """Raises UserError where a folder holds no run, or none of its stages can be used."""
    return fit([run for folder in folders for run in read_runs(folder, gpu)], gpu)


def fit(runs: Sequence[Run], gpu: Gpu) -> Fitted:
    """To all runs, and what it is worth: every layout predicted from the others."""
    fitted, chosen = fitted_to(runs, gpu)
    without = {layout: fitted_to(others, gpu)[0] if (others := _others(runs, layout)) else None for layout in {run.layout for run in runs}}
    measured = [
        Measured(run.name, run.measured_s, run.predicted_s(fitted), None if (other := without[run.layout]) is None else run.predicted_s(other)) for run in runs
    ]
    return Fitted(fitted, chosen, tuple(measured))


def _others(runs: Sequence[Run], layout: Layout) -> list[Run]:
    """Whatever their batches and recompute, runs of one layout are left out together."""
    return [run for run in runs if run.layout != layout]


def fitted_to(runs: Sequence[Run], gpu: Gpu) -> tuple[Gpu, tuple[str, ...]]:
    """The subset of constants whose best positive values leave the smallest squared relative error, a larger one only where it is better by a hundredth: the
    type with them, and their names."""
    best: tuple[float, dict[str, float]] | None = None
    for size in range(1, max(1, min(len(CONSTANTS), len(runs) - 1)) + 1):
        for chosen in combinations(CONSTANTS, size):
            solved = _solved(runs, chosen)
            if solved is not None and (best is None or solved[0] < 0.99 * best[0]):
                best = solved
    if best is None:
        raise UserError("--calibrate", f"no constant of {gpu.name} could be fitted to {len(runs)} stages", "give runs that took longer, or of other layouts")
    values = best[1]
    slowest = max(gpu.network_latency_s, values.get("node_latency_s", 0.0))
    return gpu.model_copy(update={**values, "network_latency_s": slowest}), tuple(values)


def read_runs(folder: Path, gpu: Gpu) -> list[Run]:
    """The supervised stages of a run folder. Whose lines lack what is needed, as those of older versions do, is refused by name."""
    if not (folder / "config.yaml").is_file():
        raise UserError("--calibrate", f"{folder} is not the folder of a run: it holds no config.yaml", "give a folder such as runs/tiny")
    config = load_config(folder / "config.yaml").config
    found = []
    for stage in ("pretrain", "sft"):
        records = read_metrics(folder / stage)
        timed = [record for record in records if STEP_S in record]
        if not timed:
            continue
        if missing := [name for name in (POSITIONS_PER_ROW, TILES_PER_ROW) if name not in timed[-1]]:
            raise UserError("--calibrate", f"{folder / stage / FILE_NAME} does not say {missing[0]}", "run the stage again with this version")
        found.append(_run(config, stage, folder, timed[1:] or timed, gpu))
    if not found:
        raise UserError("--calibrate", f"{folder} holds no {FILE_NAME} of pretrain or sft with {STEP_S}", "give the folder of a run that has trained")
    return found


def _run(config: RunConfig, stage: str, folder: Path, records: Sequence[Record], gpu: Gpu) -> Run:
    """The first line holds the warm-up and is left out where there are others."""
    middle = {name: statistics.median(record[name] for record in records) for name in (STEP_S, POSITIONS_PER_ROW, TILES_PER_ROW)}
    layout = Layout.of(config.parallel)
    assumed = Assumed(min(middle[POSITIONS_PER_ROW], config.data.max_length), round(middle[TILES_PER_ROW]))
    work: Workload = workload(config, "pretrain" if stage == "pretrain" else "sft", assumed)
    work = replace(work, mean_row_tokens=middle[POSITIONS_PER_ROW], row_tokens=max(1, round(middle[POSITIONS_PER_ROW])))
    cluster = Cluster(gpu, layout.num_ranks, layout.num_ranks)
    name = f"{folder.name}/{stage} {name_of(layout)}{f' on {layout.num_ranks}' if layout.num_ranks > 1 else ''}"
    return Run(name, Search(config, work, cluster), layout, config.parallel.recompute, middle[STEP_S])


def _solved(runs: Sequence[Run], chosen: tuple[str, ...]) -> tuple[float, dict[str, float]] | None:
    """Least squares of relative errors in the chosen constants, or in their inverses: what is left, and their values. None where a value is not positive or
    cannot be told from others."""
    parts = [run.parts(chosen) for run in runs]
    rows = [[column / run.measured_s for column in columns] for run, (_, columns) in zip(runs, parts, strict=True)]
    targets = [1 - base / run.measured_s for run, (base, _) in zip(runs, parts, strict=True)]
    size = len(chosen)
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(size)] + [sum(row[i] * target for row, target in zip(rows, targets, strict=True))]
        for i in range(size)
    ]
    solution = _gauss(matrix)
    if solution is None or min(solution) <= 0:
        return None
    left = sum((sum(map(mul, row, solution)) - target) ** 2 for row, target in zip(rows, targets, strict=True))
    values = {name: 1 / value if name in _INVERSE else value for name, value in zip(chosen, solution, strict=True)}
    return (left, values) if values.get("mfu", 0.5) <= 1 else None


def _gauss(matrix: list[list[float]]) -> list[float] | None:
    """Solves the square system whose last column is the right side; None where it is singular."""
    size, rows = len(matrix), [list(row) for row in matrix]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        if abs(rows[pivot][column]) < 1e-12:
            return None
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(size):
            if row != column:
                factor = rows[row][column] / rows[column][column]
                rows[row] = [value - factor * above for value, above in zip(rows[row], rows[column], strict=True)]
    return [rows[row][size] / rows[row][row] for row in range(size)]
