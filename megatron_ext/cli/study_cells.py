"""The runs that a study is made of: one for every arm and seed, and one for every seed's shared stages, each with its whole configuration.

recipe + overrides of the study (+ those of the arm) + seed, name, output_dir  ->  RunConfig  ->  runs/<study>/<arm>/seed-<k>
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_ext.cli.marks import DONE, read_mark, settings_of
from megatron_ext.cli.options import layout_problems
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.cli.stages import STAGES, Stage, needs, recipe, sections
from megatron_ext.config.load import load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.config.study import as_overrides
from megatron_ext.config.study_schema import OWN_FIELDS, SHARED, StudyConfig, split_endpoint
from megatron_ext.errors import ConfigError, UserError

_PLACE = "{shared}"


@dataclass(frozen=True)
class Cell:
    """One run. `overrides`: what is typed behind the recipe's file; `given`: stages that it gets from `needs`, the seed's shared run."""

    name: str
    arm: str
    seed: int
    until: str
    config: RunConfig
    overrides: tuple[str, ...]
    needs: str | None = None
    given: tuple[Stage, ...] = ()

    @cached_property
    def folder(self) -> RunFolder:
        return RunFolder(self.config.run_dir)

    @property
    def stages(self) -> list[Stage]:
        """All that it needs, in order."""
        return recipe(self.until, self.config)

    @property
    def own(self) -> list[Stage]:
        """Those that it does itself."""
        return [stage for stage in self.stages if stage not in self.given]

    @property
    def evaluation(self) -> Path:
        """The file that is compared."""
        return self.folder.evaluation(self.until.removeprefix("evaluate-"))

    @property
    def done(self) -> bool:
        """Whether every stage is, with these settings."""
        marks = [(stage, read_mark(stage.folder(self.folder) / DONE)) for stage in self.stages]
        return all(mark is not None and mark.settings == settings_of(self.config, sections(stage, self.config)) for stage, mark in marks)


@dataclass(frozen=True)
class Cells:
    """`shared` by seed, empty where nothing is shared; `of_arms` seed by seed, so that pairs are finished early."""

    shared: dict[int, Cell]
    of_arms: tuple[Cell, ...]

    @property
    def every(self) -> list[Cell]:
        """In the order in which they are run."""
        seeds = dict.fromkeys(cell.seed for cell in self.of_arms)
        return [cell for seed in seeds for cell in [*([self.shared[seed]] if self.shared else []), *(one for one in self.of_arms if one.seed == seed)]]

    def named(self, name: str) -> Cell:
        for cell in self.every:
            if cell.name == name:
                return cell
        raise UserError("--cell", f"there is no run {name!r}", f"there are: {', '.join(cell.name for cell in self.every)}")


def cells_of(study: StudyConfig) -> Cells:
    """Every run, checked. Raises ConfigError with what is wrong in any arm; what is wrong in several is told once."""
    problems: dict[str, UserError] = {}
    shared: dict[int, Cell] = {}
    of_arms: list[Cell] = []
    for seed in study.seeds:
        try:
            if study.shared:
                shared[seed] = _cell(study, SHARED, seed, study.shared, {}, None)
            for arm, values in study.arms.items():
                of_arms.append(_cell(study, arm, seed, study.ends_at(arm), values, shared.get(seed)))
        except ConfigError as error:
            problems |= {str(problem): problem for problem in error.problems}
            break
    if problems:
        raise ConfigError(list(problems.values()))
    found = Cells(shared, tuple(of_arms))
    if wrong := [problem for cell in found.of_arms[: len(study.arms)] for problem in _unmeasured(study, cell)]:
        raise ConfigError(wrong)
    return found


def settings_by_arm(study: StudyConfig, cells: Cells) -> dict[str, dict[str, Any]]:
    """arm -> every setting that changes what its runs learn or measure; seed and place, which differ from run to run, left out."""
    names = tuple(name for name in RunConfig.model_fields if name not in (*OWN_FIELDS, "parallel", "observe"))
    found = {}
    for cell in cells.of_arms[: len(study.arms)]:
        place = str(cells.shared[cell.seed].folder.root) if cells.shared else ""
        settings = settings_of(cell.config, names)
        found[cell.arm] = _replaced(settings, place, _PLACE) if place else settings
    return found


def _cell(study: StudyConfig, arm: str, seed: int, until: str, values: dict[str, Any], shared: Cell | None) -> Cell:
    merged = {**study.overrides, **values, "seed": seed, "name": f"seed-{seed}", "output_dir": str(study.study_dir / arm)}
    if shared is not None:
        merged = _replaced(merged, _PLACE, str(shared.folder.root))
    overrides = as_overrides(merged)
    name = f"{arm}/seed-{seed}"
    try:
        config = load_config(study.recipe, overrides, [layout_problems]).config
    except ConfigError as error:
        raise ConfigError([UserError(f"{name}: {problem.where}", problem.problem, problem.remedy) for problem in error.problems]) from None
    given = () if shared is None else _given(config, shared)
    return Cell(name, arm, seed, until, config, tuple(overrides), shared.name if shared is not None else None, given)


def _replaced(value: Any, old: str, new: str) -> Any:
    """The value with `old` replaced in every text in it."""
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, old, new) for item in value]
    return value.replace(old, new) if isinstance(value, str) else value


def _given(config: RunConfig, shared: Cell) -> tuple[Stage, ...]:
    """The shared stages that this configuration would do in the same way, after the same ones."""
    found: list[Stage] = []
    for stage in shared.stages:
        mine, theirs = (settings_of(one, sections(stage, one)) for one in (config, shared.config))
        needed = {STAGES[name] for name in needs(stage, config)}
        if mine == theirs and needed <= set(found):
            found.append(stage)
    return tuple(found)


def _unmeasured(study: StudyConfig, cell: Cell) -> list[UserError]:
    """Endpoints that this run's evaluation will not measure."""
    settings, problems = cell.config.evaluate, []
    for endpoint in study.endpoints:
        measure, _ = split_endpoint(endpoint)
        _, _, count = measure.partition("@")
        if count and int(count) != settings.samples:
            remedy = f"use {measure.partition('@')[0]}@{settings.samples}, or set evaluate.samples"
            problems.append(UserError(f"{cell.name}: {endpoint}", f"is not measured with evaluate.samples = {settings.samples}", remedy))
    return problems
