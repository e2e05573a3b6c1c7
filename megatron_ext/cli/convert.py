"""`convert --from hf --to megatron SRC DST`, and back: checkpoints of InternVL with Qwen3 or Qwen3-MoE, and of these alone, streamed."""

from __future__ import annotations

import argparse
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import yaml

from megatron_ext.config.schema import ModelConfig
from megatron_ext.errors import EXIT_OK, UserError
from megatron_ext.observe.progress import StageProgress, stage_progress

_RECIPE = "# The model of a converted checkpoint, to start a recipe from. model.clvr may be switched on: fresh adapters have no effect."
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="a Hugging Face folder, or a checkpoint of ours (a step folder, or a folder of them)")
    parser.add_argument("destination", type=Path, metavar="DST", help="what to write")
    parser.add_argument("--from", dest="source_format", choices=("hf", "megatron"), required=True)
    parser.add_argument("--to", dest="destination_format", choices=("hf", "megatron"), required=True)
    parser.add_argument("--like", type=Path, metavar="DIR", help="to hf: the folder it was converted from, for config.json, names and tokenizer files")
    parser.add_argument("--without-clvr", action="store_true", help="to hf: leave the CLVR adapters out, which makes it a plain InternVL checkpoint")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="to hf: the largest weight file (default 5GB)")
    parser.epilog = (
        "An interrupted conversion to megatron goes on where it was. Nothing is visible in DST before it is whole.\n\n"
        "examples:\n  megatron-ext convert --from hf --to megatron InternVL3_5-30B-A3B-HF checkpoints/internvl3_5_30b\n"
        "  megatron-ext convert --from megatron --to hf runs/mine/sft/checkpoints exported --like InternVL3_5-30B-A3B-HF --without-clvr"
    )


def run(args: argparse.Namespace) -> int:
    directions = {("hf", "megatron"): _to_megatron, ("megatron", "hf"): _to_hf}
    pair = (args.source_format, args.destination_format)
    if pair not in directions:
        raise UserError("convert", f"--from {pair[0]} --to {pair[1]} converts nothing", "use hf to megatron, or megatron to hf")
    if not args.source.is_dir():
        raise UserError("SRC", f"there is no folder {args.source}", "give the folder of a checkpoint")
    directions[pair](args)
    return EXIT_OK


class _Shown:
    """Progress that learns with its first report how much there is to do."""

    def __init__(self) -> None:
        self._open = ExitStack()
        self._bar: StageProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, _: str, done: int, total: int) -> None:
        self._bar = self._bar or self._open.enter_context(stage_progress("convert", total))
        self._bar.update(done)


def _to_megatron(args: argparse.Namespace) -> None:
    from megatron_ext.checkpoint.hf.to_megatron import hf_to_megatron

    with _Shown() as progress:
        described = hf_to_megatron(args.source, args.destination, progress)
    recipe = args.destination / "model.yaml"
    recipe.write_text(f"{_RECIPE}\n{yaml.safe_dump(_recipe(described.model, args.source))}", encoding="utf-8")
    print(f"written: {args.destination}, {f'image token {described.image_token}' if described.model.vision.enabled else 'a language model alone'}")
    print(f"its model as a configuration: {recipe}")
    print(f"to start from it: sft.init_from={args.destination}")


def _recipe(model: ModelConfig, source: Path) -> dict[str, Any]:
    """What a configuration needs to be of this model."""
    settings = model.model_dump(mode="json")
    del settings["preset"]
    images = {"image_size": model.vision.image_size, "image_processing": "internvl"} if model.vision.enabled else {"kind": "jsonl"}
    has_tokenizer = (source / "tokenizer_config.json").is_file()
    tokenizer = {"tokenizer": str(source.resolve())} if has_tokenizer else {"vocab_size": min(256, model.vocab_size)}
    if model.num_experts:
        experts = {"discover": {"committee_top": model.experts_per_token, "experts_per_layer": min(2, model.num_experts - 1)}}
    else:
        experts = {"earl": {"enabled": False}}
    return {"model": settings, "data": {**images, **tokenizer, "max_length": min(8192, model.max_positions // 2)}, **experts}


def _to_hf(args: argparse.Namespace) -> None:
    from megatron_ext.checkpoint.hf.from_megatron import megatron_to_hf

    size = _bytes(args.max_shard_size)
    with _Shown() as progress:
        megatron_to_hf(args.source, args.destination, args.like, without_clvr=args.without_clvr, max_shard_bytes=size, progress=progress)
    print(f"written: {args.destination}")


def _bytes(text: str) -> int:
    """
    >>> _bytes("1.5GB")
    1500000000
    """
    match = re.fullmatch(r"([0-9.]+)\s*(|KB|MB|GB)", text.strip().upper())
    if match is None:
        raise UserError("--max-shard-size", f"{text!r} is not a size", "write for example 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
