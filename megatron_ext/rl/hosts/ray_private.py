"""What keeps a Ray cluster to itself: a private folder on every node, a token that others cannot read, and the environment of its processes."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import UserError


@contextmanager
def private_folder(token: str) -> Iterator[Path]:
    """A folder for one node of one cluster, with the token in it. Socket paths below it stop at 107 bytes, for which the system's temporary folder may be
    too long."""
    folder = Path(tempfile.mkdtemp(prefix="mx-", dir="/tmp"))
    file = folder / "token"
    file.touch(mode=0o600)
    file.write_text(token)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_token(path: Path) -> str:
    """The token that the nodes of a cluster share. Raises UserError where there is none, or one that others could read: such a cluster is not started."""
    if not path.exists() or not (token := path.read_text().strip()):
        raise UserError(str(path), "holds no token: anyone in the network could run programs in this Ray cluster", "write a long random word into it")
    if (mode := path.stat().st_mode & 0o777) & 0o077:
        raise UserError(str(path), f"can be read by others (mode {mode:o})", f"chmod 600 {path}")
    return token


def cluster_variables(token: Path) -> dict[str, str]:
    """The environment of every process of a cluster."""
    import_path = [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]  # ranks must find this package wherever the driver was started
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # else Ray kills ranks when other programs of the machine use its memory
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",  # else every rank repeats what libraries warn of, such as accelerators that are not installed
        "PYTHONPATH": os.pathsep.join(filter(None, import_path)),
    }
