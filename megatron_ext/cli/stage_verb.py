"""`tokenizer`, `pretrain`, `sft`, `mpo`, `discover`, `rl`: one stage of a recipe, after the stages it needs."""

from __future__ import annotations

import argparse

from megatron_ext.cli.options import add_config_arguments, add_force_argument, add_profile_argument, resolve
from megatron_ext.cli.stages import STAGES, require
from megatron_ext.cli.work import work
from megatron_ext.errors import EXIT_OK


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    add_force_argument(parser)
    verb = parser.get_default("verb")
    call = f"megatron-ext {verb} examples/tiny.yaml{' mpo.steps=200 mpo.optimizer.lr=1e-4' if verb == 'mpo' else ''}"
    examples = [call]
    if verb == "mpo":
        examples.append("megatron-ext mpo mine.yaml mpo.steps=1000 mpo.pairs=pairs.jsonl mpo.init_from=runs/mine/sft/checkpoints")
    if verb != "tokenizer":
        add_profile_argument(parser)
        examples.append(f"{call} --profile 5")
    before = f"The stages before it must be done: `megatron-ext run CONFIG --until {verb}` does them all."
    parser.epilog = "\n  ".join([f"{before}\n\nexample{'s' * (len(examples) > 1)}:", *examples])


def run(args: argparse.Namespace) -> int:
    resolved = resolve(args)
    if resolved is None:
        return EXIT_OK
    require(STAGES[args.verb], resolved.config)
    work(resolved, [STAGES[args.verb]], args.force)
    return EXIT_OK
