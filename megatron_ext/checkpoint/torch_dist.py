"""Megatron's `torch_dist` format, written and read in this process.

Megatron's own strategies save through spawned and forked processes and unpickle the metadata without restraint. These two keep the format (other
Megatron tools read it) and its resharding, but write with torch's plain writer, and let the metadata name nothing but metadata.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_ext.errors import CheckpointError

_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "pathlib": {"PosixPath"},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _METADATA_NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return read_metadata(Path(self.path))


def read_metadata(checkpoint: Path) -> Metadata:
    """Names, shapes and places of the tensors in a checkpoint. Raises CheckpointError for a file that is anything else."""
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _MetadataUnpickler(stream).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, OSError) as error:
        raise CheckpointError(str(path), f"cannot be read ({error})", "the checkpoint is damaged: use another one") from error
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    return cast(Metadata, metadata)


class MetadataReader(FileSystemReader):
    """Reads with metadata that has been read before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._metadata


class InProcessSave(TorchDistSaveShardedStrategy):
    """One file per rank, holding the shards that this rank is the main replica of."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        save(
            mcore_to_pyt_state_dict(flat, False),
            storage_writer=FileSystemWriter(checkpoint_dir, single_file_per_rank=True, thread_count=1, sync_files=True),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


class InProcessLoad(TorchDistLoadShardedStrategy):
    def load(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> dict[str, Any]:
        flat, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        pyt = mcore_to_pyt_state_dict(flat, True)
        load(pyt, storage_reader=_Reader(checkpoint_dir), planner=MCoreLoadPlanner())
        values = {key: _unwrap_pyt_sharded_tensor(value) for key, value in pyt.items()}
        loaded = _replace_sharded_keys_with_state_dict_keys(values, flat_mapping, rename_mapping)
        _restore_dict_types(loaded, sharded_state_dict)
        return cast(dict[str, Any], loaded)


def check_tensors(sharded_state_dict: dict[str, Any], checkpoint: Path) -> None:
    """Raises CheckpointError unless the checkpoint holds every tensor that is asked for, in the same full shape. Changes nothing."""
    stored = read_metadata(checkpoint).state_dict_metadata
    for tensor in nested_values(sharded_state_dict):
        if not isinstance(tensor, ShardedTensor):
            continue
        entry = stored.get(tensor.key)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(str(checkpoint), f"has no tensor {tensor.key}", "it was saved from another model, or with other parameters frozen")
        if tuple(entry.size) != tuple(tensor.global_shape):
            raise CheckpointError(
                str(checkpoint), f"{tensor.key} has shape {tuple(entry.size)}, this model wants {tuple(tensor.global_shape)}", "it was saved from another model"
            )
