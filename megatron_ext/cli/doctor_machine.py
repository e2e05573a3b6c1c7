"""What `doctor` finds out about the machine by trying: memory, disk, loopback, whether ranks reach each other, how GPUs are linked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from megatron_ext.cli.findings import Finding
from megatron_ext.errors import RankFailed

SMALL_DISK_BYTES = 20 * 10**9
ROUND_TRIP_TIMEOUT_S = 120.0


def machine(folder: Path, imports: bool) -> list[Finding]:
    """Of the machine that this runs on, and of the disk that `folder` is on. `imports`: nothing that is known stops Megatron from being imported."""
    untried = Finding("note", "ranks", "not tried: the package called wrong above breaks the import of Megatron")
    return [memory(), disk(folder), loopback(), *links(), round_trip() if imports else untried]


def memory() -> Finding:
    """Host memory, and how much of it is shared memory, through which data loaders and NCCL talk: containers often give 64 MB."""
    pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    shared = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").exists() else 0
    text = f"{pages * size / 2**30:.0f} GiB, {shared / 2**30:.1f} GiB of it may be shared memory (/dev/shm)"
    return Finding("ok", "memory", text) if shared >= 2**30 else Finding("note", "memory", f"{text}: give the container more (--shm-size)")


def disk(folder: Path) -> Finding:
    """Room for checkpoints where runs are written."""
    free = shutil.disk_usage(folder).free
    text = f"{free / 1e9:.0f} GB free at {folder.resolve()}"
    return Finding("ok", "disk", text) if free >= SMALL_DISK_BYTES else Finding("note", "disk", f"{text}: a checkpoint is 18 bytes a parameter")


def loopback() -> Finding:
    """Ranks of one machine meet at its loopback address, and Ray there too."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname(), timeout=5):
            return Finding("ok", "ports", f"a free port was bound and reached at 127.0.0.1; this machine calls itself {socket.gethostname()}")
    except OSError as error:
        return Finding("wrong", "ports", f"127.0.0.1 cannot be bound or reached ({error}): bring the loopback interface up, or look at the firewall")


def links() -> Iterator[Finding]:
    """How GPUs are joined, where there are several: NVLink or PCIe decides what tensor parallelism costs."""
    if which("nvidia-smi") is None:
        return
    asked = subprocess.run(["nvidia-smi", "topo", "--matrix"], capture_output=True, text=True, check=False)
    rows = [line.split() for line in asked.stdout.splitlines() if line.startswith("GPU")]
    kinds = sorted({word for row in rows for word in row[1 : 1 + len(rows)] if word != "X"})
    if len(rows) > 1:
        fast = all(kind.startswith("NV") for kind in kinds)
        text = f"{len(rows)} GPUs joined by {', '.join(kinds)}"
        yield Finding("ok", "gpu links", text) if fast else Finding("note", "gpu links", f"{text}: keep tensor parallelism among those joined by NV")


def round_trip() -> Finding:
    """Two ranks, as training starts them, add up 16 MiB: over gloo, or, with GPUs, over NCCL, where each has its own."""
    import torch

    from megatron_ext.parallel.local import run_ranks
    from megatron_ext.parallel.round_trip import BYTES, all_reduce_s

    count = min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2
    try:
        seconds = max(run_ranks(all_reduce_s, count, timeout_s=ROUND_TRIP_TIMEOUT_S))
    except RankFailed as error:
        return Finding("wrong", "ranks", f"do not reach each other: {str(error).strip().splitlines()[-1]}")
    return Finding("ok", "ranks", f"{count} added up {BYTES >> 20} MiB in {seconds * 1000:.1f} ms, {BYTES / seconds / 1e9:.1f} GB/s")
