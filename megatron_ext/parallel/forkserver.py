"""A fork server of our own: one small process that has imported torch and Megatron, from which ranks are forked in milliseconds.

Python's own server is one per process, and whoever starts it first decides what it imports. This one is separate, so that ranks start with torch loaded
while others fork light processes from Python's. It starts with the first rank, is reused by all later ones, and ends with this process.
"""

from __future__ import annotations

import io
import os
import sys
from multiprocessing import forkserver, popen_forkserver, reduction, spawn, util
from multiprocessing.context import set_spawning_popen
from multiprocessing.process import BaseProcess
from typing import Any

from megatron_ext.parallel.environment import environment

_PRELOAD = "megatron_ext.parallel.preload"
_server = forkserver.ForkServer()


class ForkedProcess(BaseProcess):
    """A process forked from the server; used like `multiprocessing.Process`. Its target must be importable, and not from `__main__`."""

    _start_method = "forkserver"

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_forkserver.Popen:
        return _Popen(process_obj)


def leave_server() -> None:
    """For a forked process that leads a process group: the server no longer lives on for its sake, but ends with the process that asked for it. With its parent
    gone the group is an orphan, and the system wakes its members if they are stopped, so that they can end, too."""
    inherited: Any = forkserver._forkserver
    if inherited._forkserver_alive_fd is not None:
        os.close(inherited._forkserver_alive_fd)
        inherited._forkserver_alive_fd = None


class _Popen(popen_forkserver.Popen):
    """Python's own, but asking our server, and without importing the parent's main module again in every rank."""

    _fds: list[int]

    def _launch(self, process_obj: BaseProcess) -> None:
        preparation = spawn.get_preparation_data(process_obj.name)
        for key in ("init_main_from_name", "init_main_from_path"):
            preparation.pop(key, None)
        message = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(preparation, message)
            reduction.dump(process_obj, message)
        finally:
            set_spawning_popen(None)
        _server.set_forkserver_preload([_PRELOAD])
        with environment(_for_the_server()):
            self.sentinel, write_end = _server.connect_to_new_process(self._fds)
        # The child reads the message from the other end; our copy of this end lets it notice when this process dies.
        kept_open = os.dup(write_end)
        self.finalizer = util.Finalize(self, _close, (kept_open, self.sentinel))
        with open(write_end, "wb", closefd=True) as pipe:
            pipe.write(message.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _for_the_server() -> dict[str, str]:
    """What the server must find when it starts: our import path, one thread for the pools that libraries size as they load, and NVML as the way to ask for
    GPUs. Some libraries ask as they load, and whoever asks CUDA itself may not use it in what is forked afterwards."""
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
