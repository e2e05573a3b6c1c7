"""From one of our checkpoints to a Hugging Face folder that `from_pretrained` loads: weights in shards, the configuration and tokenizer files of the
checkpoint it came from.

    a model with CLVR: the names of transformers in memory, its adapters, and the file that computes it (modeling_internvl_clvr.py)
    without, or left out: the names of the checkpoint it came from; plain transformers loads it

    check the model against config.json                                   (before a byte is written)
    for every shard: read its tensors, take them apart, write the file    (one shard in memory, and one layer's experts)
    index, config.json, tokenizer files, digests; rename                  (there whole, or not at all)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_ext.checkpoint import folder as files
from megatron_ext.checkpoint.dist import model_differences, read_state
from megatron_ext.checkpoint.hf.configuration import Described, Spelling, describe, read_architecture
from megatron_ext.checkpoint.hf.names import Entry, entries, in_memory
from megatron_ext.checkpoint.hf.shapes import full_shape
from megatron_ext.checkpoint.hf.source import INDEX, SINGLE
from megatron_ext.checkpoint.hf.space import refusals_named, require_space
from megatron_ext.checkpoint.hf.to_megatron import place_of
from megatron_ext.checkpoint.hf.transforms import part_shapes, split
from megatron_ext.checkpoint.torch_dist import MetadataReader, read_metadata
from megatron_ext.config.schema import ClvrConfig, ModelConfig
from megatron_ext.errors import CheckpointError

MANIFEST = "sha256.json"
_CARRIED = (".json", ".txt", ".model", ".jinja")
"""What else a checkpoint's folder holds that belongs to the model: tokenizer, chat template, image processing. Code is not carried."""


MODELING = "modeling_internvl_clvr"
_EXPORTED = {"fusion": ("attention",), "memory": ("image", "learned"), "inject": ("text", "all")}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the Hugging Face checkpoint: its size, and how to make it."""

    num_bytes: int
    make: Callable[[], torch.Tensor]


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

    Raises CheckpointError, with `destination` as it was, when the checkpoint is not of that model, or is damaged, and where there is no room.
    """
    step = files.find_checkpoint(checkpoint)
    record = read_state(step)
    trained = ModelConfig(**record["model"])
    clvr = trained.clvr if trained.clvr.enabled and not without_clvr else None
    model = trained.model_copy(update={"clvr": ClvrConfig(enabled=False, taps=())})
    described = _described(record, trained, like, step)
    differing = list(model_differences(described.model.model_dump(mode="json"), model.model_dump(mode="json")))
    if differing:
        raise CheckpointError(str(step), f"is of another model than {like or 'its config.json'}: {differing[0]}", "name the folder it was converted from")
    if destination.exists():
        raise CheckpointError(str(destination), "exists already", "convert into a new folder")
    reader = Reader(step)
    tensors = dict(_plain(model, described.spelling if clvr is None else "transformers", reader))
    if clvr is not None:
        _require_known(clvr, step)
        if described.spelling != "transformers":
            raise CheckpointError(
                str(step), f"has {len(clvr.taps)} CLVR adapters, for which the original InternVL code has no place", "leave them out with --without-clvr"
            )
        tensors = {**_fused(tensors, model), **dict(_adapters(clvr, reader))}
    require_space(destination, sum(tensor.num_bytes for tensor in tensors.values()))
    draft = destination.with_name(f"{destination.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with refusals_named(destination, "free some space and run the same command again"):
            draft.mkdir(parents=True)
            _write_weights(tensors, draft, max_shard_bytes, progress)
            _write_companions(described.config, clvr, like, draft)
            draft.rename(destination)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return described


def _require_known(clvr: ClvrConfig, step: Path) -> None:
    """The code that is exported beside the weights computes all options but these."""
    unknown = [f"{field} = {getattr(clvr, field)}" for field, known in _EXPORTED.items() if getattr(clvr, field) not in known]
    if unknown:
        problem = f"has CLVR options that the code for transformers does not compute: {', '.join(unknown)}"
        raise CheckpointError(str(step), problem, "leave the adapters out with --without-clvr")


def _write_companions(config: Mapping[str, Any], clvr: ClvrConfig | None, like: Path | None, draft: Path) -> None:
    """What stands beside the weights: configuration, code, tokenizer, digests."""
    values = config if clvr is None else _with_clvr(config, clvr)
    (draft / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if clvr is not None:
        shutil.copyfile(Path(__file__).with_name(f"{MODELING}.py"), draft / f"{MODELING}.py")
    _carry(like, draft)
    digests = {path.name: files.describe_file(path) for path in sorted(draft.iterdir())}
    files.write_synced(draft / MANIFEST, json.dumps(digests, indent=1))


def _write_weights(tensors: dict[str, _Tensor], draft: Path, max_shard_bytes: int, progress: Callable[[str, int, int], None]) -> None:
    sizes = {name: tensor.num_bytes for name, tensor in tensors.items()}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=lambda size: size, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_bytes
    )
    for number, (file, names) in enumerate(plan.filename_to_tensors.items(), 1):
        safetensors.torch.save_file({name: tensors[name].make() for name in names}, draft / file, metadata={"format": "pt"})
        progress(file, number, len(plan.filename_to_tensors))
    if plan.is_sharded:
        index = {"metadata": {**plan.metadata}, "weight_map": plan.tensor_to_filename}
        (draft / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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

    def copy(self, name: str) -> torch.Tensor:
        return self.read(name).clone()

    def under(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Names and sizes in bytes of the tensors whose name starts so."""
        for name, entry in self._metadata.state_dict_metadata.items():
            if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata):
                yield name, entry.properties.dtype.itemsize * entry.size.numel()

    def _entry(self, name: str) -> Any:
        entry = self._metadata.state_dict_metadata.get(place_of(name).key)
        if entry is None:
            raise CheckpointError(str(self._step), f"has no tensor {place_of(name).key}", "it was saved from another model")
        return entry


def _described(record: dict[str, Any], trained: ModelConfig, like: Path | None, step: Path) -> Described:
    """What the result's config.json says, completed by what only the checkpoint knows: tying and the treatment of pixels."""
    if like is not None:
        described = read_architecture(like)
    elif "hf" in record["state"]:
        described = describe(record["state"]["hf"]["config"])
    else:
        raise CheckpointError(str(step), "was not converted from a Hugging Face checkpoint", "name one of the same architecture with --like")
    pixels = {"image_mean": trained.vision.image_mean, "image_std": trained.vision.image_std}
    settled = {"tie_embeddings": trained.tie_embeddings, "vision": described.model.vision.model_copy(update=pixels)}
    return replace(described, model=described.model.model_copy(update=settled))


def _plain(model: ModelConfig, spelling: Spelling, reader: Reader) -> Iterator[tuple[str, _Tensor]]:
    """The tensors of the model without CLVR."""
    for entry in entries(model, spelling):
        item = reader.dtype(entry.ours).itemsize
        for number, (name, shape) in enumerate(zip(entry.parts, part_shapes(entry, full_shape(entry.ours, model), model), strict=True)):
            yield name, _Tensor(item * torch.Size(shape).numel(), partial(_take, entry, number, model, reader))


def _take(entry: Entry, number: int, model: ModelConfig, reader: Reader) -> torch.Tensor:
    return split(entry, reader.read(entry.ours), model)[number].clone(memory_format=torch.contiguous_format)


def _fused(tensors: dict[str, _Tensor], model: ModelConfig) -> dict[str, _Tensor]:
    """The same tensors as transformers has them in memory: other prefixes, and the experts of a layer in two tensors. Code of its own does not get
    transformers' renaming of what it saves."""
    single = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")
    fused: dict[str, _Tensor] = {}
    for name, tensor in tensors.items():
        match = single.fullmatch(name)
        if match is None:
            fused[in_memory(name)] = tensor
        elif match[2] == "0" and match[3] != "up":
            kinds = ("gate", "up") if match[3] == "gate" else ("down",)
            experts = [[tensors[f"{match[1]}{expert}.{kind}_proj.weight"] for kind in kinds] for expert in range(model.num_experts)]
            where = in_memory(f"{match[1]}{'gate_up' if len(kinds) == 2 else 'down'}_proj")
            fused[where] = _Tensor(sum(part.num_bytes for parts in experts for part in parts), partial(_stack, experts))
    return fused


def _stack(experts: list[list[_Tensor]]) -> torch.Tensor:
    return torch.stack([torch.cat([part.make() for part in parts]) for parts in experts])


def _adapters(clvr: ClvrConfig, reader: Reader) -> Iterator[tuple[str, _Tensor]]:
    """CLVR's own tensors keep their names."""
    for tap in range(len(clvr.taps)):
        for name, num_bytes in reader.under(f"decoder.taps.{tap}."):
            yield f"clvr.{tap}.{name.removeprefix(f'decoder.taps.{tap}.')}", _Tensor(num_bytes, partial(reader.copy, name))


def _with_clvr(config: Mapping[str, Any], clvr: ClvrConfig) -> dict[str, Any]:
    """`config.json` of a model whose code lies beside it."""
    name = "InternVLClvrForConditionalGeneration"
    classes = {"AutoConfig": f"{MODELING}.InternVLClvrConfig", "AutoModelForImageTextToText": f"{MODELING}.{name}"}
    told = {**clvr.model_dump(mode="json", exclude={"enabled"}), "ends": [list(ends) for ends in clvr.active_taps]}
    return {**config, "architectures": [name], "model_type": "internvl_clvr", "auto_map": classes, "clvr": told}


def _carry(like: Path | None, draft: Path) -> None:
    for path in sorted(like.iterdir()) if like is not None else ():
        if path.is_file() and path.suffix in _CARRIED and path.name not in ("config.json", INDEX, SINGLE, MANIFEST):
            shutil.copyfile(path, draft / path.name)
