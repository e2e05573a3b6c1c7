"""Which tar shards a path names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from megatron_ext.errors import DataError


def shards_of(path: Path | None) -> tuple[Path, ...]:
    """The shards that a path names: a folder of them, one of them, or a pattern with {000..031}, {a,b}, * and ?. Raises DataError where it names none."""
    if path is None:
        raise DataError("data.path", "is not set, but data.kind is webdataset", "name a folder of .tar shards, or a pattern")
    if path.is_dir():
        found = sorted(path.glob("*.tar"))
    else:
        found = [shard for name in _braces(str(path)) for shard in _glob(Path(name))]
        missing = [shard for shard in found if not shard.is_file()]
        if missing:
            raise DataError("data.path", f"{len(missing)} of {len(found)} shards are missing, the first of them {missing[0]}", "mend the pattern")
    if not found:
        raise DataError("data.path", f"{path} names no .tar shards", "name a folder of them, or a pattern such as part-{000000..000031}.tar")
    return tuple(found)


def _braces(pattern: str) -> Iterator[str]:
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if number % 2 else [part] for number, part in enumerate(parts)]
    return ("".join(chosen) for chosen in product(*choices))


def _choices(text: str) -> list[str]:
    """
    >>> _choices("08..11"), _choices("a,b")
    (['08', '09', '10', '11'], ['a', 'b'])
    """
    span = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if span is None:
        return text.split(",")
    return [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]


def _glob(path: Path) -> list[Path]:
    """Files that match; a name without * and ? is itself, there or not."""
    if not re.search(r"[*?\[]", str(path)):
        return [path]
    anchor = Path(path.anchor or ".")
    return sorted(anchor.glob(str(path.relative_to(anchor))))
