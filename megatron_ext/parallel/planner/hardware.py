"""Devices and links: what `gpus.yaml`, or a file of the user's in the same form, says about them, and which link a group of ranks talks over.

Ranks are numbered as Megatron does it (`tp-cp-ep-dp-pp`): a tensor-parallel group is a run of neighbours, pipeline stages stand furthest apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from megatron_ext.config.section import Section
from megatron_ext.errors import UserError

BUILT_IN = Path(__file__).with_name("gpus.yaml")


class Gpu(Section):
    """One device, with its share of the links of its node. Peaks are dense; rates are bytes a second in one direction."""

    name: str
    torch_names: tuple[str, ...] = ()
    """What torch calls it."""
    memory_gib: float = Field(gt=0)
    """What a process can allocate."""
    bf16_flops: float = Field(gt=0)
    fp32_flops: float = Field(gt=0)
    memory_bytes_per_s: float = Field(gt=0)
    node_bytes_per_s: float = Field(gt=0)
    """To the other devices of its node."""
    network_bytes_per_s: float = Field(gt=0)
    """To other nodes."""
    mfu: float = Field(gt=0, le=1)
    """Share of the peak that arithmetic alone reaches."""
    link_efficiency: float = Field(gt=0)
    memory_efficiency: float = Field(gt=0)
    layer_overhead_s: float = Field(ge=0)
    """Of one pass through one decoder layer."""
    step_overhead_s: float = Field(ge=0)
    node_latency_s: float = Field(ge=0)
    network_latency_s: float = Field(ge=0)
    overlap: float = Field(ge=0, le=1)
    """Share of data-parallel communication that hides behind the backward pass where it may."""
    context_bytes: float = Field(ge=0)
    communicator_bytes: float = Field(ge=0)
    """Of one process group."""
    allowance: float = Field(ge=0)
    """Share of the memory that fragmentation and uneven experts take."""
    host_network_bytes_per_s: float = Field(gt=0)
    digest_bytes_per_s: float = Field(gt=0)
    fused_kernels: bool

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gib * 2**30)

    def flops(self, dtype: str) -> float:
        return self.bf16_flops if dtype == "bf16" else self.fp32_flops


@dataclass(frozen=True)
class Cluster:
    """`gpus` devices of one type in nodes of `per_node`."""

    gpu: Gpu
    gpus: int
    per_node: int

    def __post_init__(self) -> None:
        if self.gpus > self.per_node and self.gpus % self.per_node:
            whole = self.gpus // self.per_node * self.per_node
            raise UserError("--gpus", f"{self.gpus} do not fill nodes of --gpus-per-node {self.per_node}", f"use {whole} or {whole + self.per_node}")

    def collective_s(self, num_bytes: float, ranks: int, stride: int) -> float:
        """An all-gather or reduce-scatter of `num_bytes`, the sum over the ranks, in a ring: every rank passes (n - 1) / n of them on. Between nodes the
        members on one node share its network links."""
        if ranks == 1 or not num_bytes:
            return 0.0
        members = self._on_one_node(ranks, stride)
        gpu = self.gpu
        rate, latency = gpu.node_bytes_per_s, gpu.node_latency_s
        if members < ranks:
            rate, latency = min(rate, gpu.network_bytes_per_s * members), gpu.network_latency_s
        return num_bytes * (ranks - 1) / ranks / (rate * gpu.link_efficiency) + latency

    def all_reduce_s(self, num_bytes: float, ranks: int, stride: int) -> float:
        """A reduce-scatter and a gather in one call."""
        return self.collective_s(2 * num_bytes, ranks, stride)

    def signal_s(self, ranks: int, stride: int) -> float:
        """A collective that sends next to nothing."""
        if ranks == 1:
            return 0.0
        return self.gpu.network_latency_s if self._on_one_node(ranks, stride) < ranks else self.gpu.node_latency_s

    def all_to_all_s(self, num_bytes: float, ranks: int, stride: int) -> float:
        """Every rank sends `num_bytes`, the n-th part of them to each rank; what leaves the node goes over its own network link."""
        if ranks == 1:
            return 0.0
        members, gpu = self._on_one_node(ranks, stride), self.gpu
        inside, outside = num_bytes * (members - 1) / ranks, num_bytes * (ranks - members) / ranks
        slowest = max(inside / gpu.node_bytes_per_s, outside / gpu.network_bytes_per_s)
        return slowest / gpu.link_efficiency + (gpu.network_latency_s if outside else gpu.node_latency_s)

    def send_s(self, num_bytes: float, stride: int) -> float:
        """To the rank `stride` further on."""
        gpu, leaves = self.gpu, stride >= self.per_node
        rate, latency = (gpu.network_bytes_per_s, gpu.network_latency_s) if leaves else (gpu.node_bytes_per_s, gpu.node_latency_s)
        return num_bytes / (rate * gpu.link_efficiency) + latency

    def _on_one_node(self, ranks: int, stride: int) -> int:
        return max(1, min(ranks, self.per_node // stride))


def read_gpus(file: Path | None = None) -> dict[str, Gpu]:
    """The built-in types, and those of `file`. Raises UserError naming the file and the field."""
    table = _read(BUILT_IN)
    defaults, types = table["defaults"], dict(table["gpus"])
    if file is not None:
        mine = _read(file)
        if unknown := [key for key in mine if key not in ("defaults", "gpus")]:
            raise UserError(f"--gpus-file {file}", f"{unknown[0]!r} is not one of its sections", "there are: defaults, gpus")
        defaults, types = {**defaults, **(mine.get("defaults") or {})}, _joined(types, mine.get("gpus") or {})
    return {name: _gpu(name, {**defaults, **(fields or {})}, file or BUILT_IN) for name, fields in types.items()}


def find_gpu(name: str, gpus: dict[str, Gpu]) -> Gpu:
    """By its name, or by the beginning of one that no other has (`h100`)."""
    found = [name] if name in gpus else [known for known in gpus if known.startswith(name.lower())]
    if len(found) == 1:
        return gpus[found[0]]
    close = get_close_matches(name.lower(), list(gpus), n=1)
    raise UserError("--gpu", f"there is no type {name!r}", f"did you mean {close[0]}?" if close else f"there are: {', '.join(gpus)}; --gpus-file adds more")


def known_device(torch_name: str) -> Gpu | None:
    """The built-in type of a device that torch calls so; None where there is none."""
    return next((gpu for gpu in read_gpus().values() if torch_name in gpu.torch_names), None)


def _joined(types: dict[str, Any], mine: dict[str, Any]) -> dict[str, Any]:
    """A type that is there already keeps what `mine` does not replace."""
    return {**types, **{name: {**(types.get(name) or {}), **(fields or {})} for name, fields in mine.items()}}


def _read(file: Path) -> dict[str, Any]:
    try:
        table = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "--gpus-file", f"{file} cannot be read ({error.strerror})", "give a YAML file such as megatron_ext/parallel/planner/gpus.yaml"
        ) from None
    except yaml.YAMLError as error:
        raise UserError("--gpus-file", f"{file} is not YAML ({error})", "start from megatron_ext/parallel/planner/gpus.yaml") from None
    if not isinstance(table, dict):
        raise UserError("--gpus-file", f"{file} has no sections", "write `gpus:` and the types below it")
    return table


def _gpu(name: str, fields: dict[str, Any], file: Path) -> Gpu:
    try:
        return Gpu(name=name, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        close = get_close_matches(field, list(Gpu.model_fields), n=1)
        remedy = f"did you mean {close[0]}?" if first["type"] == "extra_forbidden" and close else f"its fields: {', '.join(Gpu.model_fields)}"
        raise UserError(f"{name}.{field} ({file})", first["msg"][0].lower() + first["msg"][1:], remedy) from None
