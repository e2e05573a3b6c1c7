"""What verbs with a CONFIG share: the arguments, the checks, `--explain` and `--dry-run`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.cli.dry_run import describe
from megatron_ext.config.load import Resolved, explain, load_config
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.parallel.plan import check_layout, check_rollout_layout

PROFILED_STEPS = 3


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, such as examples/tiny.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values that replace those of the file, such as rl.steps=20")
    parser.add_argument("--explain", action="store_true", help="print every value and where it comes from, then stop")
    parser.add_argument("--dry-run", action="store_true", help="check everything that can be checked without training, show sizes and layout, then stop")


def add_force_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="start a stage again whose settings changed; its old folder is renamed, not deleted")


def add_profile_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        nargs="?",
        const=PROFILED_STEPS,
        type=_steps,
        help=f"record where the time of a few steps goes ({PROFILED_STEPS} unless told), print it at the end, and write it to profile/ of the stage's folder; "
        "the same as observe.profile=STEPS. Give it last",
    )


def load(args: argparse.Namespace) -> Resolved:
    """The checked configuration."""
    if args.config is None:
        raise UserError(args.verb, "needs a configuration file", f"for example `megatron-ext {args.verb} examples/tiny.yaml`")
    if "=" in args.config:
        raise UserError(args.config, "stands where the configuration file is expected", f"write `megatron-ext {args.verb} CONFIG {args.config}`")
    profiled = [] if getattr(args, "profile", None) is None else [f"observe.profile={args.profile}"]
    return load_config(Path(args.config), [*args.overrides, *profiled], [layout_problems])


def resolve(args: argparse.Namespace) -> Resolved | None:
    """The checked configuration; or None when `--explain` or `--dry-run` has said all that was asked."""
    resolved = load(args)
    if args.explain:
        print(explain(resolved), end="")
        return None
    if args.dry_run:
        print(describe(resolved.config))
        return None
    return resolved


def layout_problems(config: RunConfig) -> list[UserError]:
    """Every reason why the model cannot be laid out over the ranks asked for."""
    return check_layout(config.model, config.parallel, "parallel") + check_rollout_layout(config.model, config.rollout.parallel)


def _steps(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of steps: write --profile, or --profile STEPS, behind CONFIG and key=value")
    return int(text)
