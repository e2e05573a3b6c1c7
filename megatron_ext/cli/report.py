"""`report RUN_DIR`: the HTML report of whatever a run has produced so far."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.errors import EXIT_OK, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the folder of a run, such as runs/tiny")


def run(args: argparse.Namespace) -> int:
    if not (args.run_dir / "config.yaml").exists():
        raise UserError(str(args.run_dir), "is not the folder of a run: it holds no config.yaml", "give a folder such as runs/tiny")
    print(f"report: {report(args.run_dir)}")
    return EXIT_OK


def report(root: Path) -> Path:
    """Writes the report of a run, its rollouts included."""
    from megatron_ext.observe.report import write_report
    from megatron_ext.rl.bank.bank import ROLLOUTS
    from megatron_ext.rl.bank.overview import overview

    return write_report(root, overview(root / "rl" / ROLLOUTS))
