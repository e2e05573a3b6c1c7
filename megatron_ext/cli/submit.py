"""`submit CONFIG`: writes the SLURM job of a stage and hands it to sbatch; with `--chain`, a job for each stage, one after the other.

    configuration -> checks that need no cluster -> slurm.sbatch.j2 -> runs/<name>/logs/<stage>.sbatch -> sbatch

The files of `examples/slurm/` are what it writes for `examples/tiny.yaml`. What a site does differently stands in `site.env`.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_ext.cli.dry_run import missing_files
from megatron_ext.cli.options import load
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import EXIT_OK, ConfigError, UserError

STAGES = ("pretrain", "sft", "mpo", "rl")
TITLES = {
    "pretrain": "Pretraining: one task a rank",
    "sft": "Fine-tuning: one task a rank",
    "mpo": "Mixed preference optimisation: one task a rank",
    "rl": "Reinforcement learning and what it needs besides, the evaluations before and after, and the report: a Ray cluster, one task a node",
}
SITE = Path("examples/slurm/site.env")
# The variables of the site reach sbatch as they reach a job: by sourcing its file.
SBATCH = ["bash", "-c", 'set -aeu; source "$0"; exec sbatch --parsable "$@"']


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, such as examples/tiny.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file")
    parser.add_argument("--until", choices=STAGES, default="rl", help="the stage that the job does, after those it needs (default rl, with all evaluations)")
    parser.add_argument(
        "--chain",
        action="store_true",
        help="a job for each of pretrain, sft, mpo (with mpo.steps), rl up to --until; each starts when the one before has succeeded",
    )
    add_job_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    parser.epilog = (
        "examples:\n  megatron-ext submit examples/tiny.yaml --until pretrain --nodes 2 --dry-run\n"
        "  megatron-ext submit mine.yaml --chain --nodes 8 --gpus-per-node 8 --time 12:00:00"
    )


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """What is asked of the cluster."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="GPUs of each (default 0: CPUs over gloo)")
    parser.add_argument("--time", default="04:00:00", metavar="T", help="time limit (default 04:00:00); a job that reaches it is queued again and resumes")
    parser.add_argument("--after", metavar="JOBID", help="start when this job has succeeded")
    parser.add_argument("--site", type=Path, default=SITE, metavar="FILE", help=f"settings of the cluster (default {SITE})")


def run(args: argparse.Namespace) -> int:
    config = load(args).config
    chain = [stage for stage in STAGES if stage in ("pretrain", "sft", args.until) or (stage == "mpo" and config.mpo.steps)]
    stages = [stage for stage in chain if STAGES.index(stage) <= STAGES.index(args.until)] if args.chain else [args.until]
    problems = [*missing_files(config), *(problem for stage in stages for problem in job_problems(config, stage, args))]
    if problems:
        raise ConfigError(problems)
    scripts = {stage: render(config, stage, args) for stage in stages}
    if args.dry_run:
        print("\n".join(scripts.values()), end="")
        return EXIT_OK
    if which("sbatch") is None:
        raise UserError("sbatch", "is not on this machine", "submit from a login node of the cluster, or add --dry-run to see the script")
    after = args.after
    for stage, script in scripts.items():
        after = submit_script(config.run_dir / "logs" / f"{stage}.sbatch", script, args.site, after)
        print(f"{stage}: job {after}", flush=True)
    return EXIT_OK


def render(config: RunConfig, stage: str, args: argparse.Namespace) -> str:
    """The script of one stage."""
    recipe = [args.config, *args.overrides]
    supervised = stage != "rl"
    return script_of(
        config,
        args,
        supervised=supervised,
        title=TITLES[stage],
        command=shlex.join(["megatron-ext", "submit", *recipe, "--until", stage, *job_options(args), "--dry-run"]),
        job_name=f"{config.name}-{stage}",
        verb=shlex.join(["run", *recipe, *(["--until", stage] if supervised else [])]),
    )


def script_of(config: RunConfig, args: argparse.Namespace, *, supervised: bool, title: str, command: str, job_name: str, verb: str) -> str:
    """A script that calls `verb`, with a task for every rank (`supervised`) or for every node. `command`: what writes this script."""
    environment = Environment(loader=PackageLoader("megatron_ext.cli", "."), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    return environment.get_template("slurm.sbatch.j2").render(
        title=title,
        command=command,
        job_name=shlex.quote(job_name),
        nodes=args.nodes,
        tasks="ranks" if supervised else "nodes",
        tasks_per_node=config.parallel.num_ranks // args.nodes if supervised else 1,
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        site=shlex.quote(str(args.site)),
        run_dir=shlex.quote(str(config.run_dir)),
        verb=verb,
    )


def job_options(args: argparse.Namespace) -> Iterator[str]:
    """What was asked of the cluster, as it would be typed."""
    yield from ("--nodes", str(args.nodes))
    if args.gpus_per_node:
        yield from ("--gpus-per-node", str(args.gpus_per_node))
    yield from ("--time", args.time)
    if args.site != SITE:
        yield from ("--site", str(args.site))


def job_problems(config: RunConfig, stage: str, args: argparse.Namespace) -> Iterator[UserError]:
    """Why the stage cannot run on these nodes."""
    ranks, nodes, gpus = config.parallel.num_ranks, args.nodes, args.gpus_per_node
    if nodes < 1:
        yield UserError("--nodes", f"{nodes} is no number of machines", "use 1 or more")
    elif stage == "mpo" and not config.mpo.steps:
        yield UserError("mpo.steps", "is 0: the recipe has no such stage", "set it, for example mpo.steps=200")
    elif stage == "rl":
        if nodes > 1 and config.rl.fleet == "local":
            yield UserError("rl.fleet", f"local cannot reach {nodes} nodes", "use ray, or --nodes 1")
    elif ranks % nodes:
        fitting = [str(number) for number in range(1, ranks + 1) if ranks % number == 0]
        yield UserError("--nodes", f"{nodes} does not divide parallel.num_ranks = {ranks}", f"use {', '.join(fitting)}")
    elif gpus and ranks != nodes * gpus:
        yield UserError("parallel.num_ranks", f"{ranks} ranks are not {nodes} nodes x {gpus} GPUs = {nodes * gpus}", "give every rank one GPU and use all")
    if not args.site.is_file():
        yield UserError("--site", f"there is no {args.site}", "copy examples/slurm/site.env of the repository and adapt it")


def submit_script(path: Path, script: str, site: Path, after: str | None) -> str:
    """Hands the script to sbatch, which keeps a copy; ours stays in the run's folder. The id of the job."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    dependency = [] if after is None else [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"]
    done = subprocess.run([*SBATCH, str(site), *dependency, str(path)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError("sbatch", f"refused {path}: {done.stderr.strip()}", "correct what it names, in the options or in the site's file")
    return done.stdout.strip().split(";")[0]  # the cluster's name may follow
