"""The journal: what counts, one JSON object a line, in the order in which it came to count.

    {"kind": "train", "step": 3, "groups": [[3, "suite/train/ocr/0/12"], ...], "check": "9f..."}

A line is on disk when `append` returns. `check` is a digest (XXH3, 128 bits) over the line and over the `check` of the line before, so that a line that was
changed, lost or moved is found by the next reader, who names it. A last line without its end is one whose writer was killed before it counted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from megatron_ext.durable import refusals_told, sync
from megatron_ext.errors import StorageError

Entry = dict[str, Any]


def open_journal(path: Path) -> tuple[Journal, list[Entry], int]:
    """The journal for its one writer, what it says, and how many bytes of an unfinished last line were cut off. Raises StorageError, naming file and line,
    where one is damaged."""
    text, torn = _whole_lines(path)
    entries, digest = _checked(text, path)
    with refusals_told(path), path.open("ab") as file:
        file.truncate(len(text))
        os.fsync(file.fileno())
        sync(path.parent)
    return Journal(path, len(entries), len(text), digest), entries, torn


class Journal:
    """See `open_journal`. `num_lines`: how many there are."""

    def __init__(self, path: Path, num_lines: int, num_bytes: int, digest: str) -> None:
        self._path, self.num_lines, self._bytes, self._digest = path, num_lines, num_bytes, digest

    def append(self, entry: Entry) -> None:
        """On disk when it returns. Raises StorageError, with the journal as it was, when the operating system refuses it."""
        digest = _digest(entry, self._digest)
        line = json.dumps({**entry, "check": digest}).encode() + b"\n"
        with refusals_told(self._path), self._path.open("ab", buffering=0) as file:
            try:
                if (written := file.write(line)) != len(line):
                    file.write(line[written:])  # says why it could not
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self._bytes)
                raise
        self._digest = digest
        self._bytes += len(line)
        self.num_lines += 1


def read_journal(path: Path) -> list[Entry]:
    """What counts, for those who only read; empty without a file."""
    return _checked(_whole_lines(path)[0], path)[0]


def _whole_lines(path: Path) -> tuple[bytes, int]:
    """The file up to the end of its last whole line, and how many bytes follow."""
    text = path.read_bytes() if path.exists() else b""
    end = text.rfind(b"\n") + 1
    return text[:end], len(text) - end


def _checked(text: bytes, path: Path) -> tuple[list[Entry], str]:
    """The entries, and the digest of the last."""
    entries, digest = list[Entry](), ""
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
            found = entry.pop("check")
        except (ValueError, TypeError, AttributeError, KeyError):
            raise _damaged(path, number, "is not a line of the journal") from None
        digest = _digest(entry, digest)
        if found != digest:
            raise _damaged(path, number, f"or the line before it is not as it was written (it says {found}, its digest is {digest})")
        entries.append(entry)
    return entries, digest


def _digest(entry: Entry, before: str) -> str:
    return xxhash.xxh3_128_hexdigest((before + json.dumps(entry)).encode())


def _damaged(path: Path, number: int, problem: str) -> StorageError:
    return StorageError(f"{path}:{number}", problem, "restore the file from a copy, or start the stage afresh in another folder")
