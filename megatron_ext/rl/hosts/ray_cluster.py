"""A Ray cluster of our own, for the length of a `with` block: a token of its own, no dashboard, nothing left behind.

    with local_cluster(num_cpus=2) as folder:               on this machine alone, with no outside socket
    with spanning_cluster(nodes, num_cpus=2) as folder:     led by this machine, joined by others (`ray_node.py`); authentication is not to be had without

    folder: private (0700), short, removed at the end       folder/token: the authentication token (0600); folder/s: Ray's sessions, logs and sockets

Ray makes its own temporary folder world-readable, so it lives inside a private one. What is left after a shutdown is found and ended, however the shutdown
went, and when this process is killed (`ray_processes.py`). An existing cluster of this machine is never joined.

Ray reads parts of its environment when it is imported and never again: so it is imported here, once the environment stands, and nowhere at the top of a module.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_ext.errors import RankFailed, UserError
from megatron_ext.parallel.environment import environment
from megatron_ext.rl.hosts.ray_node import Nodes
from megatron_ext.rl.hosts.ray_private import cluster_variables, private_folder, read_token
from megatron_ext.rl.hosts.ray_processes import Head, caretaker, end_leftovers

OBJECT_STORE_BYTES = 200 << 20
"""On one machine; on nodes of a cluster, which are there for nothing else, Ray takes what it thinks fit."""
NODES_TIMEOUT_S = 300.0
"""How long the cluster waits for its nodes, all of which are on their way."""


@contextmanager
def local_cluster(num_cpus: int, num_gpus: int = 0) -> Iterator[Path]:
    """Starts Ray, yields the private folder, and ends every process that was started."""
    # Binds every socket to the loopback address; undocumented on Linux, so a test watches it.
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    with (
        private_folder(secrets.token_hex(32)) as folder,
        _started(folder, loopback, num_cpus=num_cpus, num_gpus=num_gpus, object_store_memory=OBJECT_STORE_BYTES) as ray,
    ):
        _require_loopback(ray.get_runtime_context().gcs_address)
        yield folder


@contextmanager
def spanning_cluster(nodes: Nodes, num_cpus: int, num_gpus: int = 0) -> Iterator[Path]:
    """Starts Ray on this node, has the others join, and yields the private folder once all are there. Ends with every process of it, here and there."""
    with private_folder(read_token(nodes.token)) as folder:
        try:
            with _started(folder, {}, num_cpus=num_cpus, num_gpus=num_gpus, _node_ip_address=nodes.addresses[0]) as ray:
                nodes.desk.say(ray.get_runtime_context().gcs_address)
                _await_nodes(ray, nodes.addresses)
                yield folder
        finally:  # after Ray's end here: a driver that is still there would be told of lost nodes
            nodes.desk.dismiss()


@contextmanager
def _started(folder: Path, variables: dict[str, str], **options: Any) -> Iterator[ModuleType]:
    token = folder / "token"
    with caretaker(folder), environment({**cluster_variables(token), **variables}):
        ray = _import_ray()
        head: Head | None = None
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=True,
                _temp_dir=str(folder / "s"),
                _system_config={"health_check_period_ms": 1000},
                **options,
            )
            head = Head(token)
            yield ray
        finally:
            if head is not None and head.lost() is not None:
                end_leftovers(token, grace_s=0.0)  # a shutdown would ask what is no longer there
            ray.shutdown()
            end_leftovers(token)


def _await_nodes(ray: ModuleType, addresses: tuple[str, ...]) -> None:
    deadline = time.monotonic() + NODES_TIMEOUT_S
    while missing := set(addresses) - {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}:
        if time.monotonic() > deadline:
            late = ", ".join(sorted(missing))
            raise RankFailed(f"{len(missing)} of {len(addresses)} nodes did not join the Ray cluster within {NODES_TIMEOUT_S:.0f} s: {late}", kind="late")
        time.sleep(0.2)


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
