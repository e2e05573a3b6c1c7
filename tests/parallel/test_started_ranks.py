"""Ranks that a launcher has started: rank 0 decides for all, and they form worlds at an address of its node."""

from __future__ import annotations

import socket

import pytest

from megatron_ext.parallel.local import run_ranks
from megatron_ext.parallel.store import free_port
from tests.support.started_ranks import leader_raises, two_worlds


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6"))])
def test_rank_0_decides_and_one_store_serves_one_world_after_another(host: str) -> None:
    results = run_ranks(two_worlds, 3, host, free_port(host), timeout_s=60)
    assert results == [[True, True, False, 6.0, 6.0], [False, True, False, 6.0, 6.0], [False, True, False, 6.0, 6.0]]


def test_when_rank_0_cannot_decide_the_others_end_quietly() -> None:
    first, *others = run_ranks(leader_raises, 3, "127.0.0.1", free_port("127.0.0.1"), timeout_s=60)
    assert first == "ValueError: the settings have changed"
    assert others == ["LeaderEnded: rank 0 has ended the run and says why"] * 2
