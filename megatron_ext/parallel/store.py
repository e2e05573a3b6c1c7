"""Where processes find each other: a key-value store that one of them serves at an address of its own, and nowhere else."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore


def open_store(host: str, timeout_s: float, port: int = 0) -> TCPStore:
    """Serves a store at this IPv4 or IPv6 address; port 0 takes a free one. It lives as long as the value is kept; `.port` tells where."""
    listener = socket.create_server((host, port), family=_family(host))
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), master_listen_fd=listener.detach())


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """Connects to a store, waiting for it to be opened."""
    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))


def free_port(host: str) -> int:
    """A port that nobody listens on at this address at this moment."""
    with socket.create_server((host, 0), family=_family(host)) as listener:
        return int(listener.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
