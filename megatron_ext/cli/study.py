"""`study FILE`: arms x seeds of one recipe, registered before the first run, carried out, compared, and told in words.

study.yaml -> cells (study_cells.py) -> preregistration.json -> runs (study_runs.py, or SLURM jobs: study_slurm.py) -> study.json, study.md, report.html
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_ext.cli.dry_run import missing_files
from megatron_ext.cli.marks import versions
from megatron_ext.cli.run_folder import locked
from megatron_ext.cli.study_cells import Cell, Cells, cells_of, settings_by_arm
from megatron_ext.cli.study_runs import CellRun, differing, facts, jobs_of, last_words, log_of, prepare, run_arguments
from megatron_ext.config.study import Study, explain_study, load_study
from megatron_ext.config.study_schema import SHARED, StudyConfig
from megatron_ext.errors import EXIT_FAILURE, EXIT_OK, ConfigError, StoppedForRequeue, UserError
from megatron_ext.study.registration import Registration, differences, plan_of, read_registration, register
from megatron_ext.study.schedule import Board, carry_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study", metavar="FILE", help="YAML file of a study, such as examples/earl_study.yaml")
    parser.add_argument("overrides", metavar="field=value", nargs="*", help="values of the study: seeds=[0,1], overrides.rl.steps=4, arms.NAME.earl.bonus=1")
    parser.add_argument("--explain", action="store_true", help="print the study's values and where they come from, and what each arm changes, then stop")
    parser.add_argument("--dry-run", action="store_true", help="check the configuration of every run, list them, then stop")
    parser.add_argument("--report-only", action="store_true", help="compare what is there, and write the report; run nothing")
    parser.add_argument("--amend", metavar="REASON", help="the study is another than was registered: write down why, and go on")
    parser.add_argument("--slurm", action="store_true", help="submit a SLURM job for every run instead; with --dry-run print their scripts")
    parser.add_argument("--cell", metavar="NAME", help="do this run only, such as earl/seed-0; what the jobs of --slurm call")
    from megatron_ext.cli.submit import add_job_arguments

    add_job_arguments(parser)
    parser.epilog = (
        "Runs that are done are skipped, stopped ones resume, failed ones are tried again. docs/studies/README.md tells how to read what comes out.\n\n"
        "examples:\n  megatron-ext study examples/earl_study.yaml --dry-run\n  megatron-ext study examples/earl_study.yaml\n"
        "  megatron-ext study examples/earl_study.yaml seeds=[0,1,2,3,4,5,6,7] --amend 'more power was wanted'\n"
        "  megatron-ext study examples/clvr_study.yaml --slurm --gpus-per-node 1 --time 02:00:00\n"
        "  megatron-ext study examples/clvr_study.yaml --report-only"
    )


def run(args: argparse.Namespace) -> int:
    study = load_study(Path(args.study), args.overrides)
    cells = cells_of(study.config)
    settings = settings_by_arm(study.config, cells)
    if args.explain:
        print(explain_study(study) + "\n" + "\n".join(f"# {arm}: {changed}" for arm, changed in differing(study.config, settings)))
        return EXIT_OK
    plan = plan_of(study.config, settings)
    if args.dry_run and not args.slurm:
        print(_described(study.config, cells, plan))
        return EXIT_OK
    if args.cell is not None:
        return _one(study, cells, args.cell)
    if args.slurm:
        from megatron_ext.cli.study_slurm import submit_all

        if not args.dry_run:
            register(study.config.study_dir, plan, versions(), args.amend)
        submit_all(study.config, cells, args)
        return EXIT_OK
    if args.report_only:
        _report(study.config, cells, _registered(study.config), None)
        return EXIT_OK
    with locked(study.config.study_dir, "study"):
        registration = register(study.config.study_dir, plan, versions(), args.amend)
        board = _carry_out(study.config, cells, registration)
        _report(study.config, cells, registration, board)
    return _ended(study.config, cells, board)


def _carry_out(study: StudyConfig, cells: Cells, registration: Registration) -> Board:
    from megatron_ext.cli.study_progress import study_progress
    from megatron_ext.parallel.stopping import stop_on_signals

    runs = [CellRun(study, cells, cell, force=registration.deviates) for cell in cells.every]
    done = [cell.name for cell in cells.every if cell.done]
    jobs = jobs_of(study, cells)
    print(f"{study.name}: {len(runs)} runs, {len(done)} done, {jobs} side by side; registered as {registration.digest[:16]}", flush=True)
    with stop_on_signals() as stop, study_progress(cells, jobs) as show:
        return carry_out(runs, done, jobs, lambda: stop.asked, show)


def _report(study: StudyConfig, cells: Cells, registration: Registration, board: Board | None) -> None:
    from megatron_ext.study.page import write_page
    from megatron_ext.study.results import collect, write_results
    from megatron_ext.study.table import verdicts, write_table

    results = collect(study, registration, [facts(cell, board) for cell in cells.every])
    written = [write(results, study.study_dir) for write in (write_results, write_table, write_page)]
    if results.deciding:
        print(verdicts(results))
    print("\n".join(f"written: {path}" for path in written))


def _ended(study: StudyConfig, cells: Cells, board: Board) -> int:
    """The exit code. Says which runs failed, with their last words."""
    for name in board.named("failed"):
        log = log_of(study, cells.named(name))
        print(f"{name} failed ({board.why[name]}), {log} ends with\n{last_words(log)}", file=sys.stderr)
    if board.named("stopped") or (board.named("waiting") and not board.named("failed", "blocked")):
        raise StoppedForRequeue(f"{len(board.named('done'))} of {len(board.states)} runs are done")
    if board.named("failed"):
        print("The same command tries them again.", file=sys.stderr)
    return EXIT_FAILURE if board.named("failed", "blocked") else EXIT_OK


def _one(study: Study, cells: Cells, name: str) -> int:
    """A single run, in this process."""
    from megatron_ext.cli.main import main

    registration = _registered(study.config)
    cell = cells.named(name)
    if os.environ.get("SLURM_PROCID", "0") == "0":  # the other nodes' tasks hold Ray for this one
        prepare(cell, cells)
    return main(["run", *run_arguments(study.config, cell, registration.deviates)])


def _registered(study: StudyConfig) -> Registration:
    found = read_registration(study.study_dir)
    if found is None:
        raise UserError(str(study.study_dir), "holds no study that was begun", "first `megatron-ext study FILE`")
    return found


def _described(study: StudyConfig, cells: Cells, plan: dict[str, object]) -> str:
    """Every run and what is registered. Raises ConfigError when a file that a run names is missing."""
    problems = {str(problem): problem for cell in cells.every for problem in missing_files(cell.config) if f"/{SHARED}/" not in problem.problem}
    if problems:
        raise ConfigError(list(problems.values()))
    rows = [(cell.name, _does(cell)) for cell in cells.every]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {does}" for name, does in rows]
    pairs = "; ".join(f"{arm} against {other}" for arm, other in study.pairs)
    lines += ["", f"endpoint      {study.endpoint}", f"hypotheses    {pairs}", f"runs          {len(rows)}, {jobs_of(study, cells)} side by side"]
    before = read_registration(study.study_dir)
    if before is not None:
        changed = differences(before.plan, plan)
        lines.append(f"registered    {before.registered_at}" + (f", since then changed: {'; '.join(changed)}" if changed else ", unchanged"))
    return "\n".join([*lines, "Every configuration is valid. Nothing was run."])


def _does(cell: Cell) -> str:
    own = ", ".join(stage.name for stage in cell.own)
    return f"{own}{'  (done)' if cell.done else ''}"
