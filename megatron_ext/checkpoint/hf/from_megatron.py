"""From one of our checkpoints to a Hugging Face folder that `from_pretrained` loads: weights in shards, the configuration and tokenizer files of the
checkpoint it came from.

    check the model against config.json                                   (before a byte is written)
    for every shard: read its tensors, take them apart, write the file    (one shard in memory, and one layer's experts)
    index, config.json, tokenizer files, digests; rename                  (there whole, or not at all)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.dist import model_differences, read_state
from megatron_ext.checkpoint.hf.configuration import Described, describe
from megatron_ext.checkpoint.hf.names import Entry, entries
from megatron_ext.checkpoint.hf.shapes import full_shape
from megatron_ext.checkpoint.hf.source import INDEX, SINGLE
from megatron_ext.checkpoint.hf.to_megatron import place_of
from megatron_ext.checkpoint.hf.transforms import part_shapes, split
from megatron_ext.checkpoint.torch_dist import MetadataReader, read_metadata
from megatron_ext.config.schema import ClvrConfig, ModelConfig
from megatron_ext.errors import CheckpointError

MANIFEST = "sha256.json"
_CARRIED = (".json", ".txt", ".model", ".jinja")
"""What else a checkpoint's folder holds that belongs to the model: tokenizer, chat template, image processing. Code is not carried."""


@dataclass(frozen=True)
class _Part:
    """A tensor of the Hugging Face checkpoint: the `number`-th part of one of ours."""

    entry: Entry
    number: int
    num_bytes: int


def megatron_to_hf(
    checkpoint: Path,
    destination: Path,
    like: Path | None = None,
    *,
    without_clvr: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Described:
    """Writes `destination`. `like`: the Hugging Face folder whose config.json, spelling and tokenizer files the result gets; a checkpoint that was
    converted and not trained since remembers its configuration.

    Raises CheckpointError, with `destination` as it was, when the checkpoint is not of that model, has CLVR adapters that would be left out, or is damaged.
    """
    step = files.find_checkpoint(checkpoint)
    record = read_state(step)
    model = _without_adapters(ModelConfig(**record["model"]), step, without_clvr)
    described, config = _configuration(record, like, step)
    differing = list(model_differences(described.model.model_dump(mode="json"), model.model_dump(mode="json")))
    if differing:
        raise CheckpointError(str(step), f"is of another model than {like or 'its config.json'}: {differing[0]}", "name the folder it was converted from")
    if destination.exists():
        raise CheckpointError(str(destination), "exists already", "convert into a new folder")
    reader = Reader(step)
    parts = {name: part for entry in entries(model, described.spelling) for name, part in _parts(entry, model, reader)}
    sizes = {name: part.num_bytes for name, part in parts.items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    draft = destination.with_name(f"{destination.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), 1):
        safetensors.torch.save_file({name: _take(parts[name], model, reader) for name in names}, draft / file, metadata={"format": "pt"})
        progress(file, number, len(plan.filename_to_tensors))
    if plan.is_sharded:
        index = {"metadata": {**plan.metadata}, "weight_map": plan.tensor_to_filename}
        (draft / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _carry(like, draft)
    digests = {path.name: files.describe_file(path) for path in sorted(draft.iterdir())}
    files.write_synced(draft / MANIFEST, json.dumps(digests, indent=1))
    draft.rename(destination)
    return described


class Reader:
    """Full tensors of a checkpoint, by our names. Keeps the last two keys that it read whole: an expert asks for a slice of what its neighbours ask for too."""

    def __init__(self, step: Path) -> None:
        self._step, self._kept = step, dict[str, torch.Tensor]()
        self._metadata = read_metadata(step)

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).properties.dtype

    def read(self, name: str) -> torch.Tensor:
        place = place_of(name)
        if place.key not in self._kept:
            entry = self._entry(name)
            wanted = {place.key: torch.empty(entry.size, dtype=entry.properties.dtype)}
            load(wanted, storage_reader=MetadataReader(self._step, self._metadata), no_dist=True)
            while len(self._kept) > 1:
                self._kept.pop(next(iter(self._kept)))
            self._kept[place.key] = wanted[place.key]
        whole = self._kept[place.key]
        return whole if place.expert is None else whole[place.expert]

    def _entry(self, name: str) -> Any:
        entry = self._metadata.state_dict_metadata.get(place_of(name).key)
        if entry is None:
            raise CheckpointError(str(self._step), f"has no tensor {place_of(name).key}", "it was saved from another model")
        return entry


def _without_adapters(model: ModelConfig, step: Path, without_clvr: bool) -> ModelConfig:
    if model.clvr.enabled and not without_clvr:
        raise CheckpointError(
            str(step), f"has {len(model.clvr.taps)} CLVR adapters, for which Hugging Face's InternVL has no place", "leave them out with --without-clvr"
        )
    return model.model_copy(update={"clvr": ClvrConfig(enabled=False, taps=())})


def _configuration(record: dict[str, Any], like: Path | None, step: Path) -> tuple[Described, dict[str, Any]]:
    if like is not None:
        try:
            config = json.loads((like / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(str(like / "config.json"), f"cannot be read ({error})", "give the folder of a Hugging Face checkpoint") from error
    elif "hf" in record["state"]:
        config = record["state"]["hf"]["config"]
    else:
        raise CheckpointError(str(step), "was not converted from a Hugging Face checkpoint", "name one of the same architecture with --like")
    described = describe(config, str(like / "config.json") if like else "config.json")
    tied = ModelConfig(**record["model"]).tie_embeddings
    return Described(described.model.model_copy(update={"tie_embeddings": tied}), described.image_token, described.spelling), config


def _parts(entry: Entry, model: ModelConfig, reader: Reader) -> Iterator[tuple[str, _Part]]:
    item = reader.dtype(entry.ours).itemsize
    for number, (name, shape) in enumerate(zip(entry.parts, part_shapes(entry, full_shape(entry.ours, model), model), strict=True)):
        yield name, _Part(entry, number, item * torch.Size(shape).numel())


def _take(part: _Part, model: ModelConfig, reader: Reader) -> torch.Tensor:
    return split(part.entry, reader.read(part.entry.ours), model)[part.number].clone(memory_format=torch.contiguous_format)


def _carry(like: Path | None, draft: Path) -> None:
    for path in sorted(like.iterdir()) if like is not None else ():
        if path.is_file() and path.suffix in _CARRIED and path.name not in ("config.json", INDEX, SINGLE, MANIFEST):
            shutil.copyfile(path, draft / path.name)
