"""A SLURM job for every run of a study: those of arms start when their seed's shared run has succeeded. Each is the job that `submit` writes, and calls
`study --cell`."""

from __future__ import annotations

import argparse
import shlex
from shutil import which

from megatron_ext.cli.study_cells import Cell, Cells
from megatron_ext.cli.submit import job_options, job_problems, script_of, submit_script
from megatron_ext.config.study_schema import LOGS, StudyConfig
from megatron_ext.errors import ConfigError, UserError


def submit_all(study: StudyConfig, cells: Cells, args: argparse.Namespace) -> None:
    """Submits the jobs of runs that are not done; with `--dry-run` prints their scripts."""
    left = [cell for cell in cells.every if not cell.done]
    problems = {str(problem): problem for cell in left for problem in job_problems(cell.config, "rl", args)}
    if problems:
        raise ConfigError(list(problems.values()))
    if args.dry_run:
        print("\n".join(render_cell(cell, args) for cell in left), end="")
        return
    if which("sbatch") is None:
        raise UserError("sbatch", "is not on this machine", "submit from a login node of the cluster, or add --dry-run to see the scripts")
    jobs: dict[str, str] = {}
    for cell in left:
        path = study.study_dir / LOGS / f"{cell.name.replace('/', '-')}.sbatch"
        jobs[cell.name] = submit_script(path, render_cell(cell, args), args.site, jobs.get(cell.needs or "", args.after))
        print(f"{cell.name}: job {jobs[cell.name]}", flush=True)


def render_cell(cell: Cell, args: argparse.Namespace) -> str:
    """The script of one run."""
    typed = [args.study, *args.overrides]
    return script_of(
        cell.config,
        args,
        supervised=False,
        title=f"A run of a study: {cell.name}",
        command=shlex.join(["megatron-ext", "study", *typed, "--slurm", *job_options(args), "--dry-run"]),
        job_name=cell.name.replace("/", "-"),
        verb=shlex.join(["study", *typed, "--cell", cell.name]),
    )
