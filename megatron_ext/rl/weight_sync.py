"""From the learner's weights to the rollout workers', whatever the two layouts are: full tensors, checked to the last byte before any is loaded.

    learner ranks: full_tensors -> rank 0: pack (manifest, flat buckets) -> send
                                                                             |  broadcast
    rollout ranks:                          load <- [when all have it] <- unpack (version, every digest) <- receive

The learner and every rollout replica have process groups of their own, so that a lost rollout never breaks the learner. They meet for one broadcast in a bare
gloo group over a TCPStore of rank 0. A broadcast can succeed at some receivers and fail at others: receivers therefore stage what they got and load it only
when the driver has heard from all of them, and a failed broadcast is repeated in a new group, under the next generation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, TCPStore

from megatron_ext.checkpoint.full_tensors import digest
from megatron_ext.errors import WeightSyncError
from megatron_ext.parallel.store import join_store

BUCKET_BYTES = 32 << 20
SENDER = 0


@dataclass(frozen=True)
class Meeting:
    """Where and under which number the ranks of one broadcast meet. Rank 0 is the sender."""

    host: str
    port: int
    generation: int
    num_ranks: int
    timeout_s: float


@dataclass(frozen=True)
class Entry:
    """One tensor of a parcel."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    version: int
    entries: tuple[Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        fields = json.loads(text)
        return cls(fields["version"], tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in fields["entries"]))


@dataclass(frozen=True)
class Parcel:
    """A manifest and the bytes it describes, one tensor after the other, in flat uint8 buckets of `BUCKET_BYTES`."""

    manifest: Manifest
    buckets: tuple[torch.Tensor, ...]


def pack(tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> Parcel:
    """Copies the tensors to host memory and takes their digests."""
    staged = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
    digests = digest(staged)
    raws = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in staged.items()}
    entries = (Entry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), raws[name].numel(), digests[name]) for name, tensor in staged.items())
    return Parcel(Manifest(version, tuple(entries)), torch.cat(list(raws.values())).split(BUCKET_BYTES))


def unpack(parcel: Parcel, version: int) -> dict[str, torch.Tensor]:
    """The tensors by name. Raises WeightSyncError, naming what is wrong, unless the version and every digest agree."""
    manifest = parcel.manifest
    if manifest.version != version:
        raise WeightSyncError(f"weights of version {manifest.version} arrived where version {version} was announced")
    raws = torch.cat(list(parcel.buckets)).split([entry.num_bytes for entry in manifest.entries])
    tensors = {
        entry.name: raw.clone().view(getattr(torch, entry.dtype)).view(entry.shape) for entry, raw in zip(manifest.entries, raws, strict=True)
    }  # cloned, because a tensor's bytes must be aligned to its type
    arrived = digest(tensors)
    for entry in manifest.entries:
        if arrived[entry.name] != entry.sha256:
            raise WeightSyncError(f"tensor {entry.name} of version {version} arrived damaged: its sha256 differs from the learner's")
    return tensors


def join_meeting(meeting: Meeting, rank: int, store: TCPStore | None = None) -> ProcessGroupGloo:
    """This rank's side of the broadcast group. The sender brings the store that it opened; receivers connect to it."""
    timeout = timedelta(seconds=meeting.timeout_s)
    store = store or join_store(meeting.host, meeting.port, meeting.timeout_s)
    return ProcessGroupGloo(PrefixStore(f"sync/{meeting.generation}", store), rank, meeting.num_ranks, timeout)


def send(group: ProcessGroupGloo, parcel: Parcel) -> None:
    header = torch.frombuffer(bytearray(parcel.manifest.to_json()), dtype=torch.uint8)
    _broadcast(group, torch.tensor([header.numel()]))
    for part in (header, *parcel.buckets):
        _broadcast(group, part)


def receive(group: ProcessGroupGloo) -> Parcel:
    length = torch.zeros(1, dtype=torch.int64)
    _broadcast(group, length)
    header = torch.empty(int(length), dtype=torch.uint8)
    _broadcast(group, header)
    manifest = Manifest.from_json(header.numpy().tobytes())
    sizes = [min(BUCKET_BYTES, manifest.num_bytes - start) for start in range(0, manifest.num_bytes, BUCKET_BYTES)]
    buckets = tuple(torch.empty(size, dtype=torch.uint8) for size in sizes)
    for bucket in buckets:
        _broadcast(group, bucket)
    return Parcel(manifest, buckets)


def _broadcast(group: ProcessGroupGloo, tensor: torch.Tensor) -> None:
    group.broadcast(tensor, SENDER).wait()  # type: ignore[attr-defined]
