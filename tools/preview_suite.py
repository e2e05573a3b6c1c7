"""Writes a contact sheet of the skill suite: `python tools/preview_suite.py sheet.png --kind qa --level 0`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.suite.draw import KINDS
from megatron_ext.data.suite.levels import LEVELS
from megatron_ext.data.suite.preview import contact_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the PNG file to write")
    parser.add_argument("--kind", choices=KINDS, default="qa")
    parser.add_argument("--level", type=int, choices=[level.number for level in LEVELS], default=0)
    parser.add_argument("--split", choices=("train", "val", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--columns", type=int, default=4)
    arguments = parser.parse_args()
    config = DataConfig(level=arguments.level, image_size=LEVELS[arguments.level].image_size)
    contact_sheet(config, arguments.split, arguments.kind, arguments.seed, arguments.rows, arguments.columns).save(arguments.output)


if __name__ == "__main__":
    main()
