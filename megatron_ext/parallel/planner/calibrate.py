"""Fits the free constants of a device type to finished runs: MFU, link efficiency, overhead of a layer and of a step. Without torch.

run folder: config.yaml + <stage>/metrics.jsonl  ->  layout, workload as it really was, median seconds of a step
seconds = x_0 + x_1 / mfu + x_2 / link_efficiency + x_3 layer_overhead_s + x_4 step_overhead_s            x_i: the formulas of `times.py`
-> least squares of relative errors, all constants positive, over the subsets of constants that leave at least one run over; what is not fitted stays as it was
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

from megatron_ext.config.load import load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.observe.metrics_file import FILE_NAME, POSITIONS_PER_ROW, STEP_S, TILES_PER_ROW, Record, read_metrics
from megatron_ext.parallel.plan import Layout
from megatron_ext.parallel.planner.hardware import Cluster, Gpu
from megatron_ext.parallel.planner.layout_names import name_of
from megatron_ext.parallel.planner.search import Search
from megatron_ext.parallel.planner.workload import Assumed, Workload, workload

CONSTANTS = ("mfu", "link_efficiency", "layer_overhead_s", "step_overhead_s")
_INVERSE = ("mfu", "link_efficiency")
_NEVER = 1e30


@dataclass(frozen=True)
class Measured:
    """A stage of a finished run: `measured_s`, the median of its steps, and what the formulas say of it."""

    name: str
    measured_s: float
    predicted_s: float


@dataclass(frozen=True)
class Fitted:
    """The type with its fitted constants, and the runs they were fitted to."""

    gpu: Gpu
    constants: tuple[str, ...]
    runs: tuple[Measured, ...]

    def yaml(self) -> str:
        """A fragment for --gpus-file."""
        lines = [f"    {name}: {getattr(self.gpu, name):.6g}" for name in self.constants]
        return "\n".join(["gpus:", f"  {self.gpu.name}: # fitted; the other fields as before", *lines])


@dataclass(frozen=True)
class Run:
    """A stage of a finished run, as the formulas see it."""

    name: str
    search: Search
    layout: Layout
    recompute: str
    measured_s: float

    def predicted_s(self, gpu: Gpu) -> float:
        search = Search(self.search.config, self.search.work, replace(self.search.cluster, gpu=gpu))
        rows = search.micro_rows(self.layout)[0]
        memory = search.sizer.memory(self.layout, self.recompute, rows)
        return search.evaluate(self.layout, self.recompute, rows, memory).times.total_s


def calibrate(folders: Sequence[Path], gpu: Gpu) -> Fitted:
    """Raises UserError where a folder holds no run, or none of its stages can be used."""
    return fit([run for folder in folders for run in read_runs(folder, gpu)], gpu)


def fit(runs: Sequence[Run], gpu: Gpu) -> Fitted:
    """The subset of constants whose best positive values leave the smallest squared relative error."""
    best: tuple[float, Gpu, tuple[str, ...]] | None = None
    for size in range(1, max(1, min(len(CONSTANTS), len(runs) - 1)) + 1):
        for chosen in combinations(CONSTANTS, size):
            fitted = _solved(runs, gpu, chosen)
            if fitted is None:
                continue
            error = sum((run.predicted_s(fitted) / run.measured_s - 1) ** 2 for run in runs)
            if best is None or error < 0.99 * best[0]:
                best = error, fitted, chosen
    if best is None:
        raise UserError("--calibrate", f"no constant of {gpu.name} could be fitted to {len(runs)} stages", "give runs that took longer, or of other layouts")
    _, fitted, chosen = best
    return Fitted(fitted, chosen, tuple(Measured(run.name, run.measured_s, run.predicted_s(fitted)) for run in runs))


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


def _solved(runs: Sequence[Run], gpu: Gpu, chosen: tuple[str, ...]) -> Gpu | None:
    """Least squares of relative errors in the chosen constants, or in their inverses; None where a value is not positive or cannot be told from others."""
    nothing = {name: _NEVER if name in _INVERSE else 0.0 for name in chosen}
    rows, targets = [], []
    for run in runs:
        base = run.predicted_s(gpu.model_copy(update=nothing))
        columns = [run.predicted_s(gpu.model_copy(update={**nothing, name: 1.0})) - base for name in chosen]
        rows.append([column / run.measured_s for column in columns])
        targets.append(1 - base / run.measured_s)
    size = len(chosen)
    matrix = [
        [sum(row[i] * row[j] for row in rows) for j in range(size)] + [sum(row[i] * target for row, target in zip(rows, targets, strict=True))]
        for i in range(size)
    ]
    solution = _gauss(matrix)
    if solution is None or min(solution) <= 0:
        return None
    values = {name: 1 / value if name in _INVERSE else value for name, value in zip(chosen, solution, strict=True)}
    return gpu.model_copy(update=values) if values.get("mfu", 0.5) <= 1 else None


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
