"""A run on one machine is reached from nowhere else: every socket on which any of its processes listens, at any time of the run, is on the loopback address."""

from __future__ import annotations

import socket
import threading

import psutil
import pytest

from megatron_ext.parallel.store import free_port
from megatron_ext.rl import run as rl
from tests.support.rl_run import prepare, rl_config


def listening() -> set[tuple[str, int]]:
    """(address, port) of every socket that waits for others, of this process and all that it started, now."""
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            sockets = process.net_connections("inet")
        except psutil.Error:
            continue  # it has just ended
        waiting = [one for one in sockets if one.status == psutil.CONN_LISTEN or (one.type == socket.SOCK_DGRAM and not one.raddr)]
        found |= {(one.laddr.ip.removeprefix("::ffff:"), one.laddr.port) for one in waiting}
    return found


@pytest.mark.parametrize("fleet", ["local", pytest.param("ray", marks=pytest.mark.journey)])
def test_nothing_of_a_run_on_one_machine_listens_outside_of_it(tmp_path, fleet):
    config = rl_config(tmp_path, fleet=fleet, steps=1)
    config = config.model_copy(update={"observe": config.observe.model_copy(update={"prometheus_port": free_port("127.0.0.1")})})
    checkpoint, before, seen, done = prepare(config), listening(), set(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.update(listening())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        rl.run_rl(config, tmp_path / "rl", checkpoint, None)
    finally:
        done.set()
        watcher.join()
    opened = seen - before
    assert len(opened) >= 3, "the metrics' port, the publication's store and the ranks' connections were not seen"
    assert {address for address, _ in opened} <= {"127.0.0.1", "::1"}, opened
