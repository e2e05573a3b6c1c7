"""A segment: the rollouts of one `put` in a Parquet file (zstd, with a checksum of every page) that appears whole or not at all. Its digest is taken while it
is written and compared when it is read, so that nothing else is ever taken for it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from megatron_ext.batch import FailedRollout, ScoredRollout
from megatron_ext.durable import durable_file
from megatron_ext.errors import StorageError
from megatron_ext.rl.bank.columns import SCHEMA, SHARED, SHARED_BYTES, FindTiles, Restorer, Row, as_table, row_bytes
from megatron_ext.rl.bank.ledger import Put

ROW_GROUP_BYTES = 64 << 20
"""About what is in memory at once, writing or reading."""
_BLOCK_BYTES = 1 << 20
_GROUPS_NAMED = 4


def write_segment(path: Path, rows: Sequence[Row]) -> tuple[int, str]:
    """The file's size and digest. On disk when it returns; raises StorageError, with nothing left, when the operating system refuses it."""
    with durable_file(path) as file:
        sink = _Sink(file)
        writer = pq.ParquetWriter(
            sink, SCHEMA, compression="zstd", use_dictionary=SHARED, dictionary_pagesize_limit=2 * ROW_GROUP_BYTES, write_page_checksum=True
        )
        with writer:
            for part in _parts(rows):
                writer.write_table(as_table(part))
        return sink.bytes, sink.hasher.hexdigest()


def read_segment(path: Path, put: Put, find_tiles: FindTiles, keys: Collection[str] | None = None) -> Iterator[ScoredRollout | FailedRollout]:
    """What was put, in order; with `keys`, only of these prompts. Raises StorageError where the file is not what was written."""
    check_segment(path, put)
    restorer = Restorer(find_tiles)
    try:
        with pq.ParquetFile(path, read_dictionary=SHARED_BYTES, page_checksum_verification=True) as file:
            for number in range(file.num_row_groups):
                wanted = None
                if keys is not None:
                    wanted = [key in keys for key in file.read_row_group(number, ["key"]).column("key").to_pylist()]
                    if not any(wanted):
                        continue
                table = file.read_row_group(number)
                yield from restorer.of(table if wanted is None else table.filter(pa.array(wanted)))
    except (OSError, pa.ArrowException) as error:
        raise damaged(path, put, f"cannot be read ({error})") from error


def check_segment(path: Path, put: Put) -> None:
    """Raises StorageError unless the file has the size and the digest that it was written with."""
    try:
        found = path.stat().st_size
        if found != put.bytes:
            raise damaged(path, put, f"has {found} bytes, was written with {put.bytes}")
        hasher = xxhash.xxh3_128()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                hasher.update(block)
    except OSError as error:
        raise damaged(path, put, f"cannot be read ({error.strerror})") from error
    if hasher.hexdigest() != put.digest:
        raise damaged(path, put, f"has other contents than were written (digest {hasher.hexdigest()}, expected {put.digest})")


def damaged(path: Path, put: Put, problem: str) -> StorageError:
    keys = [key for _, key in put.groups]
    named = ", ".join(keys[:_GROUPS_NAMED]) + (f" and {len(keys) - _GROUPS_NAMED} more" if len(keys) > _GROUPS_NAMED else "")
    remedy = "restore the file from a copy, or delete it and run again: groups that are still needed are generated again"
    return StorageError(str(path), f"{problem}; it holds {len(keys)} groups of draw {put.draw}: {named}", remedy)


def _parts(rows: Sequence[Row]) -> Iterator[list[Row]]:
    part, size = list[Row](), 0
    for row in rows:
        part.append(row)
        size += row_bytes(row)
        if size >= ROW_GROUP_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


class _Sink:
    """The file as Arrow wants it: written to in order, and counted."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.bytes, self.hasher = file, 0, xxhash.xxh3_128()

    def write(self, data: memoryview) -> int:
        self._file.write(data)
        self.hasher.update(data)
        self.bytes += len(data)
        return len(data)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        """Done once, when everything is written."""

    def close(self) -> None:
        """Left to whoever opened it."""
