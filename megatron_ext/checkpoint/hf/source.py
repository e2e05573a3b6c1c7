"""A Hugging Face checkpoint on disk: which tensors it holds, checked against the files' own headers, and one tensor at a time.

    folder/  config.json   model.safetensors                                     one file, or
                           model.safetensors.index.json   model-00001-of-...     shards and their index

Only headers are read until a tensor is asked for; one shard is open at a time. Fused experts (`gate_up_proj`, `down_proj`) are shown as the single experts that
they hold.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from megatron_ext.checkpoint.hf.configuration import Spelling
from megatron_ext.checkpoint.hf.names import canonical
from megatron_ext.errors import CheckpointError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is: in `file` under `name`; of a fused tensor the first index `expert` and rows [start, stop) (None: all of it)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class Source:
    """The tensors of a folder by the names of its spelling. Raises CheckpointError where files, headers and index disagree."""

    def __init__(self, folder: Path, spelling: Spelling) -> None:
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for file, names in _files(folder).items():
            header = read_header(file)
            missing = sorted(set(names) - set(header)) if names is not None else []
            if missing:
                raise CheckpointError(
                    str(file), f"holds no tensor {missing[0]}, which {INDEX} places there", "the index and the shards are of different checkpoints"
                )
            for name, (shape, dtype) in header.items():
                if names is None or name in names:
                    known = canonical(name) if spelling == "transformers" else name
                    self.tensors.update(_unfused(known, Stored(file, name, shape, dtype)))
        self._open: tuple[Path, Any] | None = None

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(dict.fromkeys(stored.file for stored in self.tensors.values()))

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor, so that nothing keeps its shard open."""
        stored = self.tensors[name]
        if self._open is None or self._open[0] != stored.file:
            self._open = None
            self._open = (stored.file, safetensors.safe_open(str(stored.file), "pt"))
        handle = self._open[1]
        if stored.expert is None:
            return handle.get_tensor(stored.name).clone()
        part = handle.get_slice(stored.name)[stored.expert]
        return part.clone() if stored.rows is None else part[stored.rows[0] : stored.rows[1]].clone()

    def close(self) -> None:
        self._open = None


def read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a safetensors file. Raises CheckpointError unless the file is as long as its header says."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length < 1 << 30 else None
    except FileNotFoundError:
        raise CheckpointError(str(file), "is missing", "copy the whole checkpoint") from None
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(str(file), f"has no safetensors header ({error})", "the file is damaged or something else") from error
    if not isinstance(header, dict):
        raise CheckpointError(str(file), "has no safetensors header", "the file is damaged or something else")
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    expected, size = 8 + length + end, file.stat().st_size
    if size != expected:
        raise CheckpointError(str(file), f"has {size} bytes, its header describes {expected}", "the file was cut off: copy it again")
    for name, entry in header.items():
        if entry["dtype"] not in _ITEM_BYTES:
            raise CheckpointError(f"{file}: {name}", f"has dtype {entry['dtype']}, which is not converted", f"converted: {', '.join(_ITEM_BYTES)}")
    return {name: (tuple(entry["shape"]), entry["dtype"]) for name, entry in header.items()}


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files with the names that the index places in each; None where there is no index."""
    if (folder / INDEX).exists():
        try:
            weights = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(str(folder / INDEX), f"is not an index ({error!r})", "copy the whole checkpoint") from error
        files: dict[Path, set[str] | None] = {}
        for name, file in weights.items():
            if Path(file).name != file:
                raise CheckpointError(str(folder / INDEX), f"places {name} in {file}, outside the folder", "an index names files beside it")
            placed = files.setdefault(folder / file, set())
            assert placed is not None
            placed.add(name)
        return dict(sorted(files.items()))
    if (folder / SINGLE).exists():
        return {folder / SINGLE: None}
    raise CheckpointError(str(folder), f"has neither {INDEX} nor {SINGLE}", "give the folder of a Hugging Face checkpoint with safetensors weights")


def _unfused(name: str, stored: Stored) -> Iterator[tuple[str, Stored]]:
    head, _, tail = name.rpartition(".experts.")
    if not head or tail not in ("gate_up_proj", "down_proj"):
        yield name, stored
        return
    num_experts, rows, columns = stored.shape
    for expert in range(num_experts):
        if tail == "down_proj":
            yield f"{head}.experts.{expert}.down_proj.weight", Stored(stored.file, stored.name, (rows, columns), stored.dtype, expert)
            continue
        half = rows // 2
        for part, span in (("gate_proj", (0, half)), ("up_proj", (half, rows))):
            yield f"{head}.experts.{expert}.{part}.weight", Stored(stored.file, stored.name, (half, columns), stored.dtype, expert, span)
