"""A Ray cluster of our own on this machine, for the length of a `with` block: no outside socket, a token of its own, nothing left behind.

    with local_cluster(num_cpus=2) as folder:      folder: private (0700), short, removed at the end
        ...                                        folder/token: the cluster's authentication token (0600); folder/s: Ray's sessions, logs and sockets

Ray makes its own temporary folder world-readable, so it lives inside a private one. Every process of the cluster inherits the path of the token file, which
no other process has: by it what is left after a shutdown is found and ended, however the shutdown went. An existing cluster of this machine is never joined.

Ray reads parts of its environment when it is imported and never again: so it is imported here, once the environment stands, and nowhere at the top of a module.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from megatron_ext.errors import UserError
from megatron_ext.parallel.environment import environment

OBJECT_STORE_BYTES = 200 << 20
LEAVE_GRACE_S = 5.0
"""How long Ray's processes may take to leave after a shutdown; then they are killed."""


@contextmanager
def local_cluster(num_cpus: int, num_gpus: int = 0) -> Iterator[Path]:
    """Starts Ray, yields the private folder, and ends every process that was started."""
    folder = Path(tempfile.mkdtemp(prefix="mx-", dir="/tmp"))  # socket paths below it stop at 107 bytes: the system's temporary folder may be too long
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    try:
        with environment(_variables(token)):
            ray = _import_ray()
            try:
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    logging_level="ERROR",
                    log_to_driver=True,
                    _temp_dir=str(folder / "s"),
                    _system_config={"health_check_period_ms": 1000},
                )
                _require_loopback(ray.get_runtime_context().gcs_address)
                yield folder
            finally:
                ray.shutdown()
                end_leftovers(token)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def cluster_processes(token: Path) -> list[int]:
    """Process ids of the cluster that was started with this token file. Linux only; elsewhere nothing is found."""
    marker, folder = f"RAY_AUTH_TOKEN_PATH={token}".encode(), str(token.parent).encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            inherited, command = marker in (entry / "environ").read_bytes().split(b"\0"), (entry / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended, or belongs to another user
        if inherited and (command.startswith(b"ray::") or folder in command):
            found.append(int(entry.name))
    return found


def end_leftovers(token: Path) -> None:
    """Waits for the cluster's processes to leave and kills those that do not, such as a rank that was stopped by a debugger."""
    deadline = time.monotonic() + LEAVE_GRACE_S
    while (left := cluster_processes(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _import_ray() -> ModuleType:
    """Ray, made to read the authentication settings of the present environment, even where an earlier cluster of this process had others."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    return ray


def _require_loopback(address: str) -> None:
    if not address.startswith("127."):
        raise UserError(
            "rl.fleet", f"Ray listens on {address}, outside this machine: it was imported before this run started", "start the run in a process of its own"
        )


def _variables(token: Path) -> dict[str, str]:
    import_path = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]  # ranks must find this package wherever the driver was started
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds every socket to the loopback address; undocumented on Linux, so a test watches it
        "RAY_memory_monitor_refresh_ms": "0",  # else Ray kills ranks when other programs of the machine use its memory
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",  # else every rank repeats what libraries warn of, such as accelerators that are not installed
        "PYTHONPATH": os.pathsep.join(filter(None, import_path)),
    }
