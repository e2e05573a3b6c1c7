"""`evaluate CONFIG`: accuracy by skill, of a stage of the run or of any checkpoint of its model."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.cli.execute import Executor, open_run
from megatron_ext.cli.options import add_config_arguments, add_force_argument, add_profile_argument, resolve
from megatron_ext.cli.profiles import show_profiles
from megatron_ext.cli.stages import STAGES, evaluate
from megatron_ext.errors import EXIT_OK, UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_force_argument(parser)
    add_profile_argument(parser)
    parser.add_argument("--of", choices=("sft", "rl"), help="evaluate the model after this stage, as `run` does")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="evaluate this checkpoint instead")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result of --checkpoint goes")
    parser.epilog = (
        "examples:\n  megatron-ext evaluate examples/tiny.yaml --of rl\n"
        "  megatron-ext evaluate examples/tiny.yaml --checkpoint runs/tiny/sft/checkpoints --out val.json evaluate.split=val"
    )


def run(args: argparse.Namespace) -> int:
    resolved = resolve(args)
    if resolved is None:
        return EXIT_OK
    if args.of is not None and args.checkpoint is None and args.out is None:
        folder = open_run(resolved)
        with folder.locked():
            Executor(resolved.config, folder, args.force).execute(STAGES[f"evaluate-{args.of}"])
        result = folder.evaluation(args.of)
    elif args.of is None and args.checkpoint is not None and args.out is not None:
        folder = open_run(resolved)
        if not args.checkpoint.exists():
            raise UserError("--checkpoint", f"there is no {args.checkpoint}", "give a checkpoints folder of a run, such as runs/tiny/sft/checkpoints")
        evaluate(resolved.config, args.checkpoint, args.out, folder.clusters if folder.clusters.exists() else None)
        result = args.out
        if resolved.config.observe.profile:
            show_profiles(args.out.with_suffix(""))
    else:
        raise UserError("evaluate", "what to evaluate is not clear", "give --of sft, --of rl, or both --checkpoint DIR and --out FILE")
    from megatron_ext.observe.summary import print_evaluation

    print_evaluation(result)
    print(f"result: {result}")
    return EXIT_OK
