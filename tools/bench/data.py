"""How fast data is prepared and read: `python -m tools.bench.data`, from the root of the repository.

    preprocessing   tokens/s of tools/preprocess_data.py and of Megatron-LM's tool (--megatron-lm DIR, a checkout), one tokenizer, as many workers each
    reading         conversations/s of shards through our records, of a plain `webdataset` reader (pip install -e '.[bench]'), and of a JSONL file

Everything is written first, from a seed. The contenders take turns within each round; medians over rounds. Reading is one process and the disk's cache, with
pictures decoded and scaled by the same code, and without, where what is read is parsed but pictures stay encoded; its processor time is given too, which other
programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_ext.config.schema import DataConfig
from megatron_ext.data.images import load_tiles
from megatron_ext.data.shard_index import open_index
from megatron_ext.data.shard_names import shards_of
from megatron_ext.data.sources import open_records

ROOT = Path(__file__).parents[2]
SIDE, PER_SHARD = 448, 125
PIECES = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default 5)")
    parser.add_argument("--megabytes", type=int, default=100, help="of text to tokenise, of which ours makes parts of 16 (default 100)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of either preprocessing tool (default: one for each core)")
    parser.add_argument("--shards", type=int, default=8, help=f"of {PER_SHARD} samples each (default 8)")
    parser.add_argument("--megatron-lm", type=Path, help="a checkout of NVIDIA/Megatron-LM; without one its tool is left out")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="where to write the medians, in seconds, elapsed and of the processor")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        preprocessing, reading = preprocess_rounds(Path(name), args), reading_rounds(Path(name), args)
    print(table(preprocessing, reading))
    if args.json:
        rounds = [*preprocessing["rounds"], *reading["rounds"]]
        cases = {name: [each[name] for each in rounds if name in each] for each in rounds for name in each}
        found = {name: {key: statistics.median(one[key] for one in took) for key in ("wall_s", "cpu_s")} for name, took in cases.items()}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class Took:
    """Seconds: elapsed, and of the processor."""

    wall_s: float
    cpu_s: float


def timed(work: Callable[[], Any]) -> Took:
    def cpu_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime + usage.ru_stime

    wall, cpu = time.perf_counter(), cpu_s()
    work()
    return Took(time.perf_counter() - wall, cpu_s() - cpu)


# --- preprocessing ---


def preprocess_rounds(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What either command takes for the text, and for a single line of it: what starting costs."""
    tokenizer, corpus, line = folder / "tokenizer", folder / "text.jsonl", folder / "line.jsonl"
    write_text(corpus, args.megabytes * 10**6)
    with corpus.open() as text:
        line.write_text(text.readline())
    train_tokenizer(corpus, tokenizer)
    workers, out = ["--workers", str(args.workers)], folder / "out"
    ours = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--tokenizer", str(tokenizer), "--output", f"{out}/x", *workers]
    commands = {"ours": (ours, str(ROOT))}
    if args.megatron_lm:
        theirs = [sys.executable, "-W", "ignore", f"{args.megatron_lm}/tools/preprocess_data.py", "--tokenizer-type", "HuggingFaceTokenizer"]
        theirs += ["--tokenizer-model", str(tokenizer), "--append-eod", "--output-prefix", f"{out}/x", *workers]
        commands["Megatron-LM"] = theirs, f"{args.megatron_lm}:{os.environ.get('PYTHONPATH', '')}"
    rounds, tokens = [], dict[str, int]()
    for _ in range(args.rounds):
        found = {}
        for what, source in (("start", line), ("text", corpus)):
            for name, (command, path) in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                took = timed(lambda command=command, source=source, path=path: run([*command, "--input", str(source)], path))
                found[f"{name} {what}"] = {"wall_s": took.wall_s}
                tokens[name] = tokens_of(out)
        rounds.append(found)
    return {"bytes": corpus.stat().st_size, "workers": args.workers, "tokens": tokens, "rounds": rounds}


def run(command: list[str], path: str) -> None:
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def write_text(path: Path, size: int) -> None:
    """Documents of 50 to 1000 words, drawn from 20000 with the frequencies of Zipf."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=rng.randint(2, 10))) for _ in range(20000)]
    weights, total, written = [0.0], 0.0, 0
    for rank in range(1, len(words) + 1):
        total += 1 / rank
        weights.append(total)
    with path.open("w") as out:
        while written < size:
            written += out.write(json.dumps({"text": " ".join(rng.choices(words, cum_weights=weights[1:], k=rng.randint(50, 1000)))}) + "\n")


def train_tokenizer(corpus: Path, folder: Path) -> None:
    """Byte-level BPE of 16000 pieces, as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=16000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=PIECES, show_progress=False)
    with corpus.open() as lines:
        tokenizer.train_from_iterator((json.loads(line)["text"] for line in islice(lines, 1000)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=PIECES[1:])
    fast.save_pretrained(folder)


def tokens_of(folder: Path) -> int:
    """Of the one dataset in the folder."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    (index,) = folder.glob("*.idx")
    dataset = IndexedDataset(str(index.with_suffix("")))  # kept: what it maps into memory goes with it
    return int(dataset.sequence_lengths.sum())


# --- reading ---


def reading_rounds(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What an epoch takes each reader, with and without pictures being decoded; and the index of the shards."""
    shards, jsonl = folder / "shards", folder / "pictures" / "lines.jsonl"
    write_pictures(shards, jsonl, args.shards)
    sharded = DataConfig(kind="webdataset", path=shards, index=folder / "index", image_size=SIDE)
    lines = DataConfig(kind="jsonl", path=jsonl, image_size=SIDE)
    readers: dict[str, Callable[[bool], int]] = {
        "ours, shards": lambda decode: read_ours(sharded, decode),
        "ours, JSONL": lambda decode: read_ours(lines, decode),
    }
    if find_spec("webdataset"):
        readers["webdataset"] = lambda decode: read_webdataset(shards, decode)
    rounds, counts = [], {name: read(False) for name, read in readers.items()}
    for _ in range(args.rounds):
        found = {"index": vars(timed(lambda: open_index.__wrapped__(shards, None)))}
        for decode in (True, False):
            for name, read in readers.items():
                found[f"{name} {'decoded' if decode else 'encoded'}"] = vars(timed(lambda read=read, decode=decode: read(decode)))
        rounds.append(found)
    return {"samples": args.shards * PER_SHARD, "counts": counts, "rounds": rounds}


def read_ours(data: DataConfig, decode: bool) -> int:
    """An epoch of the train split, shuffled."""
    records = open_records(data, "train")
    for position in range(len(records)):
        record = records[records.place(position, 0)]
        for picture in record.images:
            load_tiles(picture, data) if decode else picture.read_bytes()
    return len(records)


@dataclass(frozen=True)
class Encoded:
    """A picture that a reader has brought along."""

    name: str
    encoded: bytes

    def read_bytes(self) -> bytes:
        return self.encoded


def read_webdataset(shards: Path, decode: bool) -> int:
    """An epoch, shuffled as its documentation does it. It has no splits, so that it reads the other tenth too: rates are per conversation."""
    import webdataset

    data, count = DataConfig(image_size=SIDE), 0
    for sample in webdataset.WebDataset([str(path) for path in shards_of(shards)], shardshuffle=100, seed=0).shuffle(1000):
        turns = json.loads(sample["json"])["conversations"]
        picture = Encoded(sample["__key__"], sample["jpg"])
        load_tiles(picture, data) if decode else picture.read_bytes()
        count += bool(turns)
    return count


def write_pictures(shards: Path, jsonl: Path, count: int) -> None:
    """The same conversations in shards, and in a file with pictures beside it: JPEGs of 640 x 480 pixels, smooth enough to be as large as photographs."""
    rng = np.random.default_rng(0)
    shards.mkdir()
    jsonl.parent.mkdir()
    with jsonl.open("w") as lines:
        for shard in range(count):
            with tarfile.open(shards / f"part-{shard:04d}.tar", "w") as tar:
                for key, picture, entry in _samples(rng, shard):
                    (jsonl.parent / f"{key}.jpg").write_bytes(picture)
                    lines.write(json.dumps({"image": f"{key}.jpg", **entry}) + "\n")
                    for name, content in ((f"{key}.jpg", picture), (f"{key}.json", json.dumps(entry).encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))


def _samples(rng: np.random.Generator, shard: int) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for number in range(PER_SHARD):
        small = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
        encoded = io.BytesIO()
        small.resize((640, 480), Image.Resampling.BICUBIC).save(encoded, "JPEG", quality=90)
        words = " ".join(str(n) for n in rng.integers(0, 1000, 60))
        turns = [{"from": "human", "value": "<image>\nWhich numbers?"}, {"from": "gpt", "value": words}]
        yield f"{shard:04d}{number:04d}", encoded.getvalue(), {"conversations": turns}


# --- what is said of it ---


def table(preprocessing: dict[str, Any], reading: dict[str, Any]) -> str:
    tokens, rounds = preprocessing["tokens"], preprocessing["rounds"]
    size = f"{preprocessing['bytes'] / 1e6:.0f} MB of text, {preprocessing['workers']} workers, {len(rounds)} rounds"
    lines = [size, "", "| | tokens | whole command | to start | tokens/s | less the start | time, of ours |", "|---|---|---|---|---|---|---|"]
    for name in tokens:
        whole, start = (middle(rounds, f"{name} {what}", "wall_s") for what in ("text", "start"))
        rates = f"{tokens[name] / whole:,.0f} | {tokens[name] / (whole - start):,.0f}"
        ratio = statistics.median(each[f"{name} text"]["wall_s"] / each["ours text"]["wall_s"] for each in rounds)
        lines.append(f"| {name} | {tokens[name]:,} | {whole:.1f} s | {start:.1f} s | {rates} | {ratio:.2f} |")
    rounds, counts = reading["rounds"], reading["counts"]
    made = reading["samples"] / middle(rounds, "index", "wall_s")
    lines += ["", f"{reading['samples']} samples, {len(rounds)} rounds; an index is made at {made:,.0f} samples/s", ""]
    lines += ["| | pictures | conversations/s | of processor time | time, of ours (elapsed, processor) |", "|---|---|---|---|---|"]
    for form in ("decoded", "encoded"):
        for name, count in counts.items():
            wall, cpu = (count / middle(rounds, f"{name} {form}", key) for key in ("wall_s", "cpu_s"))
            ratio = ratios(rounds, name, "ours, shards", f" {form}", counts)
            lines.append(f"| {name} | {form} | {wall:,.0f} | {cpu:,.0f} | {ratio} |")
    return "\n".join(lines)


def middle(rounds: list[dict[str, Any]], name: str, key: str) -> float:
    return statistics.median(each[name][key] for each in rounds)


def ratios(rounds: list[dict[str, Any]], name: str, base: str, suffix: str, counts: dict[str, int] | None = None) -> str:
    """How many times as long as the base it takes, for as much: medians of the rounds' own ratios, elapsed and of the processor."""
    much = counts[base] / counts[name] if counts else 1.0
    found = [statistics.median(much * each[name + suffix][key] / each[base + suffix][key] for each in rounds) for key in ("wall_s", "cpu_s")]
    return "{:.2f}, {:.2f}".format(*found)


if __name__ == "__main__":
    main()
