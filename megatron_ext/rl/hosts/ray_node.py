"""The nodes of a Ray cluster over several machines: one process on each, started together by srun, all ending with the run.

    node 0     opens the desk, waits for all -> (runs the command, the driver: starts Ray, says where -> trains -> stops Ray, says leave) -> closes the desk
    node 1..   go to the desk                -> ([where]  ray start --address -> [leave]  end Ray's processes here)                      -> [closed]  end

The desk is a TCP connection from each node, over which nothing travels but Ray's address; it closes however the driver ends. Who may join the cluster is
decided by a token, which comes in a private file. Nothing is ended by name: other jobs of the same user on the same machines are left alone.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import RankFailed
from megatron_ext.rl.hosts.ray_private import cluster_variables, private_folder, read_token

DESK_TIMEOUT_S = 600.0
"""How long nodes wait for each other: some may be slow to load Python."""
LEAVE_TIMEOUT_S = 10.0
POLL_S = 0.5
LEAVE = "leave"


@dataclass(frozen=True)
class Nodes:
    """A cluster over several machines, as its driver knows it. `addresses[0]` is its own; `token` is a private file that all of them can read."""

    addresses: tuple[str, ...]
    token: Path
    desk: Desk


class Desk:
    """Where the other nodes wait for what the driver says. Made by `open_desk()`."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._nodes = listener, list[socket.socket]()
        self._changed = threading.Condition()
        threading.Thread(target=self._receive, daemon=True).start()

    def say(self, word: str) -> None:
        """To all who wait."""
        for node in self._nodes:
            with suppress(OSError):  # a node that has gone is missed by the cluster, which says so better
                node.sendall(f"{word}\n".encode())

    def dismiss(self) -> None:
        """Has the nodes end their part of the cluster, and waits a moment for it."""
        self.say(LEAVE)
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        for node in self._nodes:
            node.settimeout(max(0.1, deadline - time.monotonic()))
            with suppress(OSError):
                node.recv(1)

    def await_nodes(self, count: int) -> None:
        """Returns when so many have come."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._nodes) >= count, DESK_TIMEOUT_S):
                raise RankFailed(
                    f"{count - len(self._nodes)} of {count} other nodes did not come within {DESK_TIMEOUT_S:.0f} s: their logs say why", kind="late"
                )

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends `accept`, which closing alone does not
        self._listener.close()
        for node in self._nodes:
            node.close()

    def _receive(self) -> None:
        while True:
            try:
                node, _ = self._listener.accept()
            except OSError:
                return  # closed
            with self._changed:
                self._nodes.append(node)
                self._changed.notify()


@contextmanager
def open_desk(address: str, port: int, num_nodes: int) -> Iterator[Desk]:
    """Yields once the other nodes are there, so that none is left looking for a driver that has ended."""
    desk = Desk(socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET))
    try:
        desk.await_nodes(num_nodes - 1)
        yield desk
    finally:
        desk.close()


def serve_node(addresses: tuple[str, ...], number: int, port: int, token: Path) -> None:
    """The life of node 1 and the following: part of the cluster whenever there is one, until the driver ends. Raises RankFailed when Ray ends by itself."""
    secret = read_token(token)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job that is cancelled leaves no folder behind
    with _connected(addresses[0], port) as desk, private_folder(secret) as folder:
        raylet: _Raylet | None = None
        try:
            while (word := _heard(desk)) != "":
                if raylet is not None:
                    raylet.require_alive()
                if word == LEAVE:
                    if raylet is not None:
                        raylet.end()
                        raylet = None
                    desk.sendall(b".")
                elif word is not None:
                    raylet = _Raylet(word, addresses[number], folder)
        finally:
            if raylet is not None:
                raylet.end()


class _Raylet:
    """This node's part of the cluster at `ray`."""

    def __init__(self, ray: str, address: str, folder: Path) -> None:
        import torch

        self._log = folder / "ray.log"
        options = {
            "address": ray,
            "node-ip-address": address,
            "temp-dir": folder / "s",
            "num-cpus": os.cpu_count(),
            "num-gpus": torch.cuda.device_count(),
            "min-worker-port": 0,  # free ones, where the default is a range that two jobs of a node would share
            "max-worker-port": 0,
            "log-color": "false",
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats", *words]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **cluster_variables(folder / "token")}, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        print(f"joining the Ray cluster at {ray} as {address}", flush=True)

    def require_alive(self) -> None:
        if self._process.poll() is not None:
            raise RankFailed(f"Ray ended on this node with exit code {self._process.returncode}:\n{self._log.read_text(errors='replace')[-3000:]}")

    def end(self) -> None:
        """At once: nothing here is worth keeping, and a node that is asked politely tells a cluster that may have gone. Its processes share a session."""
        deadline = time.monotonic() + LEAVE_TIMEOUT_S / 2
        while (left := _session(self._process.pid)) and time.monotonic() < deadline:
            for process in left:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._process.wait()
            time.sleep(0.05)


def _session(leader: int) -> list[int]:
    """The processes that live in the session of this one."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(entry.name))
    return found


@contextmanager
def _connected(address: str, port: int) -> Iterator[socket.socket]:
    deadline = time.monotonic() + DESK_TIMEOUT_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankFailed(f"the driver is not to be found at {address} port {port} after {DESK_TIMEOUT_S:.0f} s: {error}", kind="late") from None
            time.sleep(POLL_S)
    with connection:
        connection.settimeout(POLL_S)
        yield connection


def _heard(desk: socket.socket) -> str | None:
    """The last word of the driver, None for nothing new, "" once it has gone."""
    try:
        return (desk.recv(1024).decode().split() or [""])[-1]
    except TimeoutError:
        return None
    except OSError:
        return ""
