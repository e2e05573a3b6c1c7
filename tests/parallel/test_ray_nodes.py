"""A Ray cluster over several nodes, small and for real: two addresses of this machine are the nodes, a process serves the second."""

from __future__ import annotations

import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_ext.parallel.store import free_port
from megatron_ext.rl.ranks import Call, Place, Switchboard
from megatron_ext.rl.ray_cluster import cluster_processes
from megatron_ext.rl.ray_fleet import ray_host
from megatron_ext.rl.ray_node import Nodes, open_desk
from tests.support.clerk import Clerk

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("127.0.1.1", "127.0.1.2")
SERVE = """
import sys
from pathlib import Path
from megatron_ext.rl.ray_node import serve_node
serve_node(tuple(sys.argv[1].split()), 1, int(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def second_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], int, Path]]:
    token, port = tmp_path_factory.mktemp("job") / "token", free_port(ADDRESSES[0])
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    command = [sys.executable, "-c", SERVE, " ".join(ADDRESSES), str(port), str(token)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield process, port, token
    process.kill()


def test_ranks_are_spread_over_nodes_meet_across_them_and_nobody_joins_without_the_token(second_node: Any) -> None:
    import grpc
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    process, port, token = second_node
    with open_desk(ADDRESSES[0], port, num_nodes=2) as desk:
        with ray_host(4, Nodes(ADDRESSES, token, desk)) as host:
            ranks = host.start(Clerk, [f"rank {number}" for number in range(4)])
            addresses = [host.address(rank) for rank in ranks]
            assert sorted(set(addresses)) == list(ADDRESSES) and addresses[0] == addresses[2] != addresses[1] == addresses[3]
            point = host.meeting_point("learner", ranks[0])
            assert point.startswith(f"tcp://{addresses[0]}:")
            calls = [Call(rank, "world", (Place(number, 4, point, addresses[number]),)) for number, rank in enumerate(ranks)]
            assert Switchboard(host).ask(calls, 60) == [10.0] * 4

            import ray

            with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel, pytest.raises(grpc.RpcError) as refusal:
                gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=5)
            assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED
            here = host.folder / "token"
            there = children_tokens(process.pid)
            children = psutil.Process(process.pid).children(recursive=True)
            assert there != here and len(cluster_processes(here)) >= 4 and len(children) >= 5
        assert cluster_processes(here) == []
        assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
        assert process.poll() is None  # it stays as long as the driver, whose later stages SLURM would end with the first task that has gone
    assert process.wait(timeout=20) == 0
    assert process.stdout.read().startswith("joining the Ray cluster at 127.0.1.1:")
    assert not there.parent.exists()


def children_tokens(pid: int) -> Path:
    """The token file of the second node's own part of the cluster."""
    (found,) = {child.environ().get("RAY_AUTH_TOKEN_PATH") for child in psutil.Process(pid).children()}
    return Path(found)


def test_a_node_goes_home_when_the_driver_ends_without_ever_starting_ray(tmp_path: Path) -> None:
    token, port = tmp_path / "token", free_port(ADDRESSES[0])
    token.touch(mode=0o600)
    token.write_text("secret")
    command = [sys.executable, "-c", SERVE, " ".join(ADDRESSES), str(port), str(token)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        with open_desk(ADDRESSES[0], port, num_nodes=2):
            assert process.poll() is None
        assert process.wait(timeout=20) == 0 and process.stdout.read() == ""
    finally:
        process.kill()
