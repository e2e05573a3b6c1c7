"""Megatron's `torch_dist` format, written and read in this process.

Megatron's own strategies save through spawned and forked processes, talk over torch's default group wherever they are called from, and unpickle what they
find without restraint. These keep the format (other Megatron tools read it) and its resharding, but write with torch's plain writer over the groups they are
given, let the metadata name nothing but metadata, and never open `common.pt`, a pickle that other tools want to see and that holds nothing of ours.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, CheckpointingException, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import distribute_main_replicas_with_precomputed_distribution
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

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


def refusal(error: BaseException | None) -> OSError | None:
    """What the operating system said, where that is what an error comes from: torch's writer answers a full disk with "unexpected pos 704 vs 598"."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


class _Writer(FileSystemWriter):
    """Lets the operating system's refusals through; an error that travels to other ranks forgets what caused it."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise refusal(error) or error from None


def write_tensors(sharded_state_dict: dict[str, Any], draft: Path, replicas: dist.ProcessGroup, world: dist.ProcessGroup) -> dict[str, Any]:
    """One file per rank of `world`; ranks of `replicas`, who hold the same tensors, share the writing. Returns what else there is to write. Collective.

    Raises Megatron's CheckpointingException, on every rank, unless the ranks' parts cover every tensor exactly once; torch's CheckpointException, on every
    rank, when one of them cannot write.
    """
    tensors, common = save_preprocess(sharded_state_dict, validate_access_integrity=False)
    distribution = determine_main_replica_uniform_distribution(tensors, replicas)
    distribute_main_replicas_with_precomputed_distribution(tensors, replicas, distribution)
    _check_cover(tensors, world)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(tensors, keep_only_main_replica=True)
    save(
        mcore_to_pyt_state_dict(flat, False),
        storage_writer=_Writer(draft, single_file_per_rank=True, thread_count=1, sync_files=True),
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=world,
    )
    return cast(dict[str, Any], common)


def write_common(common: dict[str, Any], draft: Path) -> None:
    """The files that make a folder of tensors one of Megatron's checkpoints, for one rank to write. Needs no process group, as Megatron's own strategy does."""
    torch.save(common, draft / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(draft))


def _check_cover(tensors: dict[str, Any], world: dist.ProcessGroup) -> None:
    """Megatron looks on rank 0 only."""
    described: list[Any] = [None] * world.size()
    dist.all_gather_object(described, [tensor.without_data() for tensor in nested_values(tensors)], group=world)
    problem: list[str | None] = [None]
    try:
        validate_sharding_integrity(described)
    except CheckpointingException as error:
        problem = [str(error)]
    dist.broadcast_object_list(problem, group=world, group_src=0)
    if problem[0] is not None:
        raise CheckpointingException(problem[0])


class NothingInCommon(TorchCommonLoadStrategy):
    """Stands for `common.pt` on loading."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        return {}


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
