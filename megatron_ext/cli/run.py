"""`run CONFIG`: every stage of the recipe in turn, then the accuracies before and after RL, and a report."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.cli.options import add_config_arguments, add_force_argument, add_profile_argument, resolve
from megatron_ext.cli.stages import STAGES, recipe
from megatron_ext.cli.work import work
from megatron_ext.errors import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_force_argument(parser)
    add_profile_argument(parser)
    parser.add_argument("--until", metavar="STAGE", help=f"stop after this stage: {', '.join(STAGES)}")
    parser.epilog = (
        "A stage that is done is skipped; one that was stopped resumes. A stage whose settings changed is refused unless --force is given.\n\n"
        "examples:\n  megatron-ext run examples/tiny.yaml\n  megatron-ext run examples/tiny.yaml --until discover seed=1 name=seed-1\n"
        "  megatron-ext run examples/tiny.yaml --until sft name=profiled --profile"
    )


def run(args: argparse.Namespace) -> int:
    resolved = resolve(args)
    if resolved is None:
        return EXIT_OK
    folder = work(resolved, recipe(args.until, resolved.config), args.force)
    if folder is not None:
        conclude(folder.root)
    return EXIT_OK


def conclude(root: Path) -> None:
    """Prints the table of accuracies, where they were measured, and writes the report."""
    from megatron_ext.cli.report import report
    from megatron_ext.observe.summary import print_summary

    print_summary(root)
    print(f"report: {report(root)}")
