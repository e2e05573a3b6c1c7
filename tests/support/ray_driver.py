"""The driver of a small Ray cluster over two nodes, in a process of its own: Ray decides once a process which addresses it may listen on.

python -m tests.support.ray_driver ADDRESSES PORT TOKEN PID    prints what it found as JSON; PID is the process that serves the second node
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil

from megatron_ext.rl.hosts.ranks import Place
from megatron_ext.rl.hosts.ray_host import ray_host
from megatron_ext.rl.hosts.ray_node import Nodes, open_desk
from megatron_ext.rl.hosts.ray_processes import cluster_processes
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
from tests.support.clerk import Clerk


def drive(addresses: tuple[str, ...], port: int, token: Path, second: psutil.Process) -> dict[str, object]:
    with open_desk(addresses[0], port, len(addresses)) as desk:
        with ray_host({"rank": 4}, nodes=Nodes(addresses, token, desk)) as host:
            ranks = host.start(Clerk, [f"rank {number}" for number in range(4)])
            where = [host.address(rank) for rank in ranks]
            point = host.meeting_point("learner", ranks[0])
            calls = [Call(rank, "world", (Place(number, 4, point, where[number]),)) for number, rank in enumerate(ranks)]
            sums = Switchboard(host).ask(calls, 60)
            refusal = answer_without_token()
            away = next(rank for rank, address in zip(ranks, where, strict=True) if address == addresses[1])
            stopped = psutil.Process(Switchboard(host).ask([Call(away, "pid")], 60)[0])
            stopped.suspend()
            host.end(away)
            ended, (replacement,) = not stopped.is_running(), host.start(Clerk, [away.name])
            Switchboard(host).ask([Call(replacement, "pid")], 60)
            place = host.address(replacement)
            here, there = cluster_processes(host.folder / "token"), second.children(recursive=True)
        return {
            "addresses": where,
            "meeting point": point,
            "sums": sums,
            "without the token": refusal,
            "a stopped rank there": [ended, place],
            "processes": [len(here), len(there)],
            "left here": cluster_processes(host.folder / "token"),
            "left there": [child.pid for child in there if child.is_running() and child.status() != psutil.STATUS_ZOMBIE],
            "second node waits": second.is_running(),
        }


def answer_without_token() -> str:
    """What a stranger is told who asks for the list of nodes."""
    import grpc
    import ray
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with grpc.insecure_channel(ray.get_runtime_context().gcs_address) as channel:
        try:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=5)
        except grpc.RpcError as error:
            return error.code().name
    return "answered"


if __name__ == "__main__":
    addresses, port, token, pid = sys.argv[1:]
    print(json.dumps(drive(tuple(addresses.split()), int(port), Path(token), psutil.Process(int(pid)))))
