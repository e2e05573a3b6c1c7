"""The processes of a Ray cluster of ours on this machine: how they are found, watched and ended.

Every one inherits the path of the token file, which no other process has. A caretaker, this file run as a program of its own, ends them and removes the private
folder when the driver dies without having done so: killed, or ended by Ray itself. Linux only; elsewhere nothing is found.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LEAVE_GRACE_S = 5.0
"""How long Ray's processes may take to leave after a shutdown; then they are killed."""
HEAD = ("gcs_server", "raylet")


def cluster_processes(token: Path) -> list[int]:
    """Process ids of the cluster that was started with this token file."""
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


def end_leftovers(token: Path, grace_s: float = LEAVE_GRACE_S) -> None:
    """Waits for the cluster's processes to leave and kills those that do not, such as a rank that was stopped by a debugger."""
    deadline = time.monotonic() + grace_s
    while (left := cluster_processes(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class Head:
    """Ray's two processes beside the driver, without either of which the cluster is lost."""

    def __init__(self, token: Path) -> None:
        commands = {process: (Path("/proc") / str(process) / "cmdline").read_bytes().split(b"\0")[0].decode() for process in cluster_processes(token)}
        self._names = {process: Path(command).name for process, command in commands.items() if Path(command).name in HEAD}

    def lost(self) -> str | None:
        """Which of them has ended."""
        for process, name in self._names.items():
            if not _runs(process):
                return f"Ray's {name} (pid {process}) has ended"
        return None


def _runs(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@contextmanager
def caretaker(folder: Path) -> Iterator[None]:
    """Has the cluster of this folder ended, and the folder removed, should this process die meanwhile. It takes no part in Ctrl-C."""
    process = subprocess.Popen([sys.executable, "-P", __file__, str(folder)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        process.communicate()


def _take_care(folder: Path) -> None:
    sys.stdin.read()  # ends with the driver, however that ends
    while cluster_processes(folder / "token"):
        end_leftovers(folder / "token", grace_s=0.0)
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _take_care(Path(sys.argv[1]))
