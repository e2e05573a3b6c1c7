"""From a Hugging Face checkpoint to one of ours, layer by layer: at no time is more than a layer in memory.

    check config.json, names, shapes against each other                                  (before a byte is written)
    for every unit (vision, projector and embedding, each decoder layer, the end):
        read its tensors, join their parts, write one .distcp file, note its digest      (a unit that is done is not written again)
    metadata, state, manifest; rename                                                    (there whole, or not at all)

The result is a step folder like any that training writes; every layout loads it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemWriter, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner import SavePlanner as _SavePlanner

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.hf.configuration import Described, read_config
from megatron_ext.checkpoint.hf.names import Entry, entries
from megatron_ext.checkpoint.hf.shapes import full_shape
from megatron_ext.checkpoint.hf.source import DTYPES, Source
from megatron_ext.checkpoint.hf.space import refusals_named, require_space
from megatron_ext.checkpoint.hf.transforms import join, part_shapes
from megatron_ext.checkpoint.torch_dist import write_common
from megatron_ext.checkpoint.writing import STATE, weights_record
from megatron_ext.errors import CheckpointError
from megatron_ext.parallel.shards import expert_of

STEP = 0
_UNITS = "units.json"


@dataclass(frozen=True)
class Place:
    """Where one of our tensors stands in the checkpoint: `key`, and of the experts' common tensor the index along its first axis."""

    key: str
    expert: int | None


def place_of(name: str) -> Place:
    """
    >>> place_of("decoder.layers.3.mlp.experts.local_experts.7.linear_fc1.weight")
    Place(key='decoder.layers.3.mlp.experts.experts.linear_fc1.weight', expert=7)
    """
    found = expert_of(name)
    return Place(name, None) if found is None else Place(f"{found[0].removesuffix('local_experts.')}experts{found[2]}", found[1])


def hf_to_megatron(source_folder: Path, destination: Path, progress: Callable[[str, int, int], None] = lambda *_: None) -> Described:
    """Writes `destination/step_000000`. `progress(unit, done, all)` is called after each unit. Run again after an interruption, it goes on where it was.

    Raises CheckpointError, with source and destination as they were, for a source that does not agree with its own config.json, and where there is no room for
    it; where the room ends on the way, what is written is kept for the next attempt.
    """
    described = read_config(source_folder)
    source = Source(source_folder, described.spelling)
    described = _decide_tying(described, source)
    table = list(entries(described.model, described.spelling))
    _check(table, source, described)
    if (destination / files.step_name(STEP)).exists():
        raise CheckpointError(str(destination), "holds a converted checkpoint already", "convert into another folder, or remove it")
    draft = destination / f"{files.step_name(STEP)}.tmp"
    units = [(name, list(rows)) for name, rows in groupby(table, key=_unit)]
    done = _resume(draft, described, source)
    require_space(destination, sum(file.stat().st_size for file in source.files) - sum(unit["bytes"] for unit in done.values()))
    with refusals_named(destination, "free some space and run the same command again: it goes on where it was"):
        for number, (unit, rows) in enumerate(units, 1):
            if unit not in done:
                done[unit] = _write_unit(unit, rows, source, described, draft)
                _note(draft, done, described, source)
            progress(unit, number, len(units))
        source.close()
        _publish(destination, draft, table, source, described, done)
    return described


def _decide_tying(described: Described, source: Source) -> Described:
    """Output and embedding are tied where the checkpoint has no output layer: `tie_word_embeddings` at the top of an InternVL configuration is true by default,
    whatever the weights are."""
    untied = described.model.model_copy(update={"tie_embeddings": False})
    (output,) = [entry for entry in entries(untied, described.spelling) if entry.ours == "output_layer.weight"]
    return replace(described, model=untied.model_copy(update={"tie_embeddings": output.parts[0] not in source.tensors}))


def _check(table: Sequence[Entry], source: Source, described: Described) -> None:
    """Every tensor that the configuration asks for is there in the right shape, and nothing else is."""
    model, expected = described.model, set()
    for entry in table:
        dtypes = set()
        for name, shape in zip(entry.parts, part_shapes(entry, full_shape(entry.ours, model), model), strict=True):
            expected.add(name)
            stored = source.tensors.get(name)
            if stored is None:
                raise CheckpointError(
                    str(source.folder), f"holds no tensor {name}", "config.json asks for it: the checkpoint is incomplete or of another model"
                )
            if stored.shape != shape:
                raise CheckpointError(f"{stored.file}: {name}", f"has shape {stored.shape}, config.json makes {shape}", "the two are of different models")
            dtypes.add(stored.dtype)
        if len(dtypes) > 1:
            raise CheckpointError(str(source.folder), f"{entry.parts[0]} and its neighbours have dtypes {sorted(dtypes)}", "convert them to one dtype first")
    unknown = sorted(set(source.tensors) - expected)
    if unknown:
        raise CheckpointError(
            f"{source.tensors[unknown[0]].file}: {unknown[0]}",
            "is not a tensor of the model that config.json describes",
            "leaving it out would change the model",
        )


def _unit(entry: Entry) -> str:
    parts = entry.ours.split(".")
    if parts[:2] == ["decoder", "layers"]:
        return f"layer_{int(parts[2]):04d}"
    return {"vision": "vision", "projector": "projector", "embedding": "embedding"}.get(parts[0], "output")


class _Lazy(_SavePlanner):
    """Hands torch's writer each tensor as it asks for it."""

    def __init__(self, make: Callable[[str], torch.Tensor], names: dict[MetadataIndex, str]) -> None:
        self._make, self._names = make, names

    def set_up_planner(self, *_: Any, **__: Any) -> None: ...

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("plans are made per unit")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("plans are made per unit")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._make(self._names[write_item.index])


def _write_unit(unit: str, rows: Sequence[Entry], source: Source, described: Described, draft: Path) -> dict[str, Any]:
    """One file; where each tensor stands in it, by full name, with the file's size and digest."""
    by_name = {entry.ours: entry for entry in rows}
    items, names = [], {}
    for entry in rows:
        item = _write_item(entry, source, described)
        items.append(item)
        names[item.index] = entry.ours

    def make(name: str) -> torch.Tensor:
        entry = by_name[name]
        full = join(entry, [source.read(part) for part in entry.parts], described.model)
        return full if place_of(name).expert is None else full[None]

    draft.mkdir(parents=True, exist_ok=True)
    writer = FileSystemWriter(draft, single_file_per_rank=True, thread_count=1, sync_files=True)
    plan = SavePlan(items, storage_data=_StoragePrefix(f"__{unit}_"))
    written = {names[result.index]: result.storage_data for result in writer.write_data(plan, _Lazy(make, names)).wait()}
    (file,) = {info.relative_path for info in written.values()}
    return {"file": file, **files.describe_file(draft / file), "tensors": {name: [info.offset, info.length] for name, info in written.items()}}


def _write_item(entry: Entry, source: Source, described: Described) -> WriteItem:
    size, chunk, index = _geometry(entry, described)
    properties = TensorProperties(dtype=DTYPES[source.tensors[entry.parts[0]].dtype])
    return WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=size))


def _geometry(entry: Entry, described: Described) -> tuple[torch.Size, ChunkStorageMetadata, MetadataIndex]:
    """Size of the whole tensor in the checkpoint, and which chunk of it the entry is."""
    place, shape = place_of(entry.ours), full_shape(entry.ours, described.model)
    if place.expert is None:
        offsets, sizes, size = torch.Size([0] * len(shape)), torch.Size(shape), torch.Size(shape)
    else:
        offsets, sizes = torch.Size([place.expert, *[0] * len(shape)]), torch.Size([1, *shape])
        size = torch.Size([described.model.num_experts, *shape])
    return size, ChunkStorageMetadata(offsets, sizes), MetadataIndex(place.key, offsets)


def _resume(draft: Path, described: Described, source: Source) -> dict[str, Any]:
    """Units that an interrupted conversion of this very source has finished, their files still as they were written."""
    try:
        noted = json.loads((draft / _UNITS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if noted["source"] != _identity(described, source):
        return {}
    return {unit: entry for unit, entry in noted["units"].items() if files.check_file(draft, entry["file"], entry) is None}


def _note(draft: Path, done: dict[str, Any], described: Described, source: Source) -> None:
    files.write_synced(draft / f"{_UNITS}.partial", json.dumps({"source": _identity(described, source), "units": done}))
    (draft / f"{_UNITS}.partial").replace(draft / _UNITS)


def _identity(described: Described, source: Source) -> list[Any]:
    """What must not have changed between two attempts."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source.files]
    return json.loads(json.dumps([described.model.model_dump(mode="json"), described.spelling, stats]))


def _publish(destination: Path, draft: Path, table: Sequence[Entry], source: Source, described: Described, done: dict[str, Any]) -> None:
    """Metadata, state and manifest; then the rename that makes the checkpoint exist."""
    _write_metadata(draft, table, source, described, done)
    write_common({}, draft)
    origin = {"hf": {"image_token": described.image_token, "spelling": described.spelling, "config": described.config}}
    files.write_synced(draft / STATE, json.dumps(weights_record(STEP, origin, described.model), indent=1))
    (draft / _UNITS).unlink()
    known = {entry["file"]: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for entry in done.values()}
    manifest = {path.name: known.get(path.name) or files.describe_file(path) for path in sorted(draft.iterdir())}
    files.publish(destination, STEP, draft, manifest, keep=1)


def _write_metadata(draft: Path, table: Sequence[Entry], source: Source, described: Described, done: dict[str, Any]) -> None:
    """Torch's index of the checkpoint: sizes and chunks of every tensor, and where each chunk stands."""
    tensors: dict[str, TensorStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    where = {name: (unit["file"], *span) for unit in done.values() for name, span in unit["tensors"].items()}
    for entry in table:
        item = _write_item(entry, source, described)
        assert item.tensor_data is not None
        stored = tensors.setdefault(item.index.fqn, TensorStorageMetadata(item.tensor_data.properties, item.tensor_data.size, []))
        stored.chunks.append(item.tensor_data.chunk)
        file, offset, length = where[entry.ours]
        storage[MetadataIndex(item.index.fqn, item.index.offset, len(stored.chunks) - 1)] = _StorageInfo(file, offset, length)
    metadata = Metadata({**tensors}, storage_data=storage, storage_meta=StorageMeta())
    metadata.version = CURRENT_DCP_VERSION
    with (draft / ".metadata").open("wb") as stream:
        pickle.dump(metadata, stream)
