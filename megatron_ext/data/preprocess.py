"""Text for pretraining, tokenised once: JSONL files become one dataset in Megatron's indexed format.

    a.jsonl b.jsonl -> blocks of lines -> one part a block, made by several processes -> PREFIX.bin, PREFIX.idx, PREFIX.json

Every document ends with the tokenizer's end of turn. Parts that are whole are not made again, so that an interrupted run goes on; the dataset appears at the
end, `PREFIX.json` last: what it was made of, and with which tokenizer. `training/text_stream.py` reads it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_ext.data.pieces import Tokenizer
from megatron_ext.data.tokenizer import load_tokenizer, tokenizer_digest
from megatron_ext.errors import DataError

BLOCK_BYTES = 16 << 20
_NAMED = 20
"""Bad lines of a part that are named; all are counted."""


@dataclass(frozen=True)
class Block:
    """The lines of a file that start in [start, stop)."""

    number: int
    source: Path
    start: int
    stop: int


@dataclass(frozen=True)
class Tally:
    """What a part, or the whole, holds. `bad`: lines that could not be read, the first of them by name."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    bad: int = 0
    named: tuple[str, ...] = ()

    def __add__(self, other: Tally) -> Tally:
        named = (*self.named, *other.named)[:_NAMED]
        return Tally(self.documents + other.documents, self.tokens + other.tokens, self.empty + other.empty, self.bad + other.bad, named)


def preprocess(
    sources: Sequence[Path],
    prefix: Path,
    tokenizer: Path,
    *,
    key: str = "text",
    workers: int = 1,
    max_bad: int = 0,
    block_bytes: int = BLOCK_BYTES,
    progress: Callable[[int, int, Tally], None] = lambda *_: None,
) -> Tally:
    """Writes `prefix`.bin, .idx and .json. `tokenizer`: the folder of a run's tokenizer or of a Hugging Face checkpoint; `key`: the field of a line that holds
    the text. `progress(done, all, so far)` is called after each part.

    Raises DataError for sources that are missing, a dataset that is there already, and for more than `max_bad` lines that cannot be read, naming the first.
    """
    for source in sources:
        if not source.is_file():
            raise DataError(str(source), "there is no such file", "name JSONL files")
    if _with(prefix, ".idx").exists():
        raise DataError(str(prefix), "is a dataset already", "choose another name, or remove it")
    load_tokenizer(tokenizer)
    parts = _with(prefix, ".parts")
    _begin(parts, _identity(sources, tokenizer, key, block_bytes))
    blocks = list(_blocks(sources, block_bytes))
    total, left = Tally(), list[Block]()
    for block in blocks:
        done = _tally_of(parts, block)
        total, left = (total, [*left, block]) if done is None else (total + done, left)
    for finished, part in enumerate(_made(left, parts, tokenizer, key, workers), len(blocks) - len(left) + 1):
        total = total + part
        progress(finished, len(blocks), total)
        if total.bad > max_bad:
            problem = f"cannot be read, nor can {total.bad - 1} other lines so far"
            raise DataError(total.named[0], problem, f"mend them, or allow more than {max_bad} bad lines")
    if not total.documents:
        raise DataError(str(sources[0]), f"holds no text in the field {key!r}", "name the field with --key")
    _join(prefix, parts, blocks, tokenizer, {"key": key, "sources": [str(source) for source in sources], **asdict(total)})
    return total


def _identity(sources: Sequence[Path], tokenizer: Path, key: str, block_bytes: int) -> list[Any]:
    """What must not have changed between two attempts."""
    stats = [[str(source), source.stat().st_size, source.stat().st_mtime_ns] for source in sources]
    return [stats, tokenizer_digest(tokenizer), key, block_bytes]


def _begin(parts: Path, identity: list[Any]) -> None:
    """Parts of other sources, or of another tokenizer, are thrown away."""
    note = parts / "identity.json"
    if note.exists() and json.loads(note.read_text()) == identity:
        return
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    note.write_text(json.dumps(identity))


def _blocks(sources: Sequence[Path], block_bytes: int) -> Iterator[Block]:
    number = 0
    for source in sources:
        size = source.stat().st_size
        for start in range(0, size, block_bytes):
            yield Block(number, source, start, min(start + block_bytes, size))
            number += 1


def _part(parts: Path, block: Block) -> Path:
    return parts / f"part_{block.number:06d}"


def _tally_of(parts: Path, block: Block) -> Tally | None:
    """Of a part that is whole: its tally is written last."""
    path = _with(_part(parts, block), ".json")
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    return Tally(**{**values, "named": tuple(values["named"])})


def _made(blocks: Sequence[Block], parts: Path, tokenizer: Path, key: str, workers: int) -> Iterator[Tally]:
    """Parts as they are finished; by one worker in this process."""
    if workers == 1:
        yield from (_make_part(block, parts, tokenizer, key) for block in blocks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        running = [pool.submit(_make_part, block, parts, tokenizer, key) for block in blocks]
        try:
            for part in as_completed(running):
                yield part.result()
        finally:
            pool.shutdown(cancel_futures=True)


@cache
def _loaded(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def _make_part(block: Block, parts: Path, folder: Path, key: str) -> Tally:
    """In a process of the pool."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer, part = _loaded(folder), _part(parts, block)
    builder = IndexedDatasetBuilder(f"{part}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    tally = Tally()
    for offset, line in _lines(block):
        text = _text(line, key)
        if text is None:
            tally = tally + Tally(bad=1, named=(_named(block.source, offset),))
        elif not text.strip():
            tally = tally + Tally(empty=int(bool(line.strip())))
        else:
            tokens = [*tokenizer.encode(text), tokenizer.eos_id]
            builder.add_item(torch.tensor(tokens))
            builder.end_document()
            tally = tally + Tally(documents=1, tokens=len(tokens))
    builder.finalize(f"{part}.idx")
    _write(_with(part, ".json"), json.dumps(asdict(tally)))
    return tally


def _lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """The block's lines and where they start."""
    with block.source.open("rb") as stream:
        if block.start:
            stream.seek(block.start - 1)
            stream.readline()
        while (offset := stream.tell()) < block.stop:
            yield offset, stream.readline()


def _text(line: bytes, key: str) -> str | None:
    """The line's text, empty where the line is; None where it is no object with a text under the key."""
    if not line.strip():
        return ""
    try:
        text = json.loads(line)[key]
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    return text if isinstance(text, str) else None


def _named(source: Path, offset: int) -> str:
    """file:line of what starts at an offset."""
    with source.open("rb") as stream:
        before = stream.read(offset).count(b"\n")
    return f"{source}:{before + 1}"


def _join(prefix: Path, parts: Path, blocks: Sequence[Block], tokenizer: Path, record: dict[str, Any]) -> None:
    """One dataset of all parts, in the order of the sources."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    loaded = load_tokenizer(tokenizer)
    builder = IndexedDatasetBuilder(f"{parts}/whole.bin", dtype=DType.optimal_dtype(loaded.vocab_size))
    for block in blocks:
        if (found := _tally_of(parts, block)) is not None and found.documents:
            builder.add_index(str(_part(parts, block)))
    builder.finalize(f"{parts}/whole.idx")
    for suffix in (".bin", ".idx"):
        os.replace(parts / f"whole{suffix}", _with(prefix, suffix))
    _write(_with(prefix, ".json"), json.dumps({"tokenizer": tokenizer_digest(tokenizer), "vocab_size": loaded.vocab_size, **record}, indent=1))
    shutil.rmtree(parts)


def _write(path: Path, text: str) -> None:
    draft = path.with_name(f"{path.name}.partial")
    draft.write_text(text)
    os.replace(draft, path)


def _with(prefix: Path, suffix: str) -> Path:
    return prefix.with_name(prefix.name + suffix)
