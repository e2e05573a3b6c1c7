"""Tokenises JSONL files for pretraining, into Megatron's indexed format; `pretrain.text` reads the result.

python tools/preprocess_data.py --input a.jsonl b.jsonl --output corpus/web --tokenizer InternVL3_5-30B-A3B-HF --workers 8
megatron-ext pretrain mine.yaml 'pretrain.text={corpus/web: 1.0}'

An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from megatron_ext.data.preprocess import Tally, preprocess
from megatron_ext.errors import EXIT_USER, UserError
from megatron_ext.observe.progress import StageProgress, stage_progress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, metavar="FILE", help="JSONL, a document a line")
    parser.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="of the .bin, .idx and .json that are written")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="a run's tokenizer folder, or a Hugging Face checkpoint's")
    parser.add_argument("--key", default="text", help="the field that holds the text (default: text)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one for each core)")
    parser.add_argument("--max-bad", type=int, default=0, metavar="N", help="lines that may be unreadable; they are counted and named (default 0)")
    args = parser.parse_args()
    with ExitStack() as opened:
        bar: StageProgress | None = None

        def progress(done: int, total: int, so_far: Tally) -> None:
            nonlocal bar
            bar = bar or opened.enter_context(stage_progress("preprocess", total))
            bar.update(done, {"documents": so_far.documents, "tokens": so_far.tokens})

        args.output.parent.mkdir(parents=True, exist_ok=True)
        try:
            tally = preprocess(args.input, args.output, args.tokenizer, key=args.key, workers=args.workers, max_bad=args.max_bad, progress=progress)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
    for name in tally.named:
        print(f"left out: {name}", file=sys.stderr)
    print(f"{args.output}: {tally.documents} documents, {tally.tokens} tokens; left out: {tally.empty} empty, {tally.bad} unreadable")
    return 0


if __name__ == "__main__":
    sys.exit(main())
