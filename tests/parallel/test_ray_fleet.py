"""Ray for real, small: ranks answer, failures are named at once, nothing listens outside this machine, and nothing is left behind however a run ends."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_ext.errors import RankFailed, UserError
from megatron_ext.observe.fleet_watch import RoleState
from megatron_ext.rl.hosts.local_host import local_host
from megatron_ext.rl.hosts.ranks import LOOPBACK, Place
from megatron_ext.rl.hosts.ray_host import ray_host
from megatron_ext.rl.hosts.ray_processes import cluster_processes
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
from tests.support.clerk import Clerk


@pytest.fixture(scope="module")
def ray_ranks():
    with ray_host({"all": 30}) as host:
        yield host


@pytest.fixture(scope="module")
def local_ranks():
    with local_host() as host:
        yield host


@pytest.fixture(params=["local_ranks", "ray_ranks"])
def host(request):
    """Both kinds of host must behave alike."""
    return request.getfixturevalue(request.param)


def clerks(host, *names):
    return host.start(Clerk, names)


def test_ranks_keep_their_state_and_answer_in_the_order_of_the_calls(host):
    first, second = clerks(host, "learner rank 0", "learner rank 1")
    board = Switchboard(host)
    assert board.ask([Call(first, "remember", (1,)), Call(second, "remember", (2,))], 60) == [[1], [2]]
    assert board.ask([Call(second, "remember", (3,)), Call(first, "remember", (4,))], 60) == [[2, 3], [1, 4]]


def test_a_users_mistake_found_by_a_rank_arrives_as_it_is(host):
    (clerk,) = clerks(host, "careful rank")
    with pytest.raises(UserError, match=r"rl.steps: -1 is negative; use 0 or more"):
        Switchboard(host).ask([Call(clerk, "refuse")], 60)


def test_any_other_error_names_the_rank_and_carries_its_traceback(host):
    (clerk,) = clerks(host, "rollout replica 0 rank 0")
    with pytest.raises(RankFailed, match=r"(?s)rollout replica 0 rank 0 failed.*in stumble.*no such thing"):
        Switchboard(host).ask([Call(clerk, "stumble")], 60)


def test_a_rank_that_dies_is_named_at_once_while_its_peers_still_work(host):
    dying, busy = clerks(host, "the dying rank", "the busy rank")
    board = Switchboard(host)
    board.ask([Call(dying, "remember", (1,)), Call(busy, "remember", (1,))], 60)
    start = time.monotonic()
    with pytest.raises(RankFailed, match="the dying rank"):
        board.ask([Call(busy, "sleep", (30.0,)), Call(dying, "die")], 60)
    assert time.monotonic() - start < 15


def test_a_rank_that_hangs_is_named_at_the_deadline(host):
    slow, quick = clerks(host, "the slow rank", "the quick rank")
    board = Switchboard(host)
    board.ask([Call(slow, "remember", (1,)), Call(quick, "remember", (1,))], 60)
    with pytest.raises(RankFailed, match=r"no answer to 'sleep' within 1 s from the slow rank$"):
        board.ask([Call(slow, "sleep", (4.0,)), Call(quick, "sleep", (0.0,))], 1)


def test_errors_that_the_caller_settles_stand_among_the_answers_and_everyone_is_waited_for(host):
    good, bad = clerks(host, "the good rank", "the bad rank")
    answers = Switchboard(host).ask([Call(bad, "refuse"), Call(good, "remember", (1,))], 60, settle=(UserError,))
    assert isinstance(answers[0], UserError) and answers[1] == [1]


def test_a_rank_that_is_stopped_is_named_within_seconds_really_ended_and_replaced(host):
    """Its peer computes all the while, and is not silent; what is sent to the stopped process, more than any pipe holds, holds up nobody."""
    computing, stopped = host.start(Clerk, ["rollout rank 0", "rollout rank 1"], "a replica")
    board = Switchboard(host, silence_s=3)
    pids = board.ask([Call(computing, "pid"), Call(stopped, "pid")], 60)
    os.kill(pids[1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"rollout rank 1 has given .* while at 'remember'; waiting for it: rollout rank 0 \(at 'compute' for") as failure:
        board.ask([Call(computing, "compute", (60.0,)), Call(stopped, "remember", (bytes(16 << 20),))], 60)
    assert (failure.value.rank, failure.value.kind) == ("rollout rank 1", "hung") and time.monotonic() - start < 15
    for rank in (stopped, computing, stopped):
        host.end(rank)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RankFailed):
        board.ask([Call(stopped, "pid")], 60)
    (replacement,) = host.start(Clerk, ["rollout rank 1"], "a replica")
    assert board.ask([Call(replacement, "remember", (1,))], 60) == [[1]]


def test_a_rank_that_is_killed_loses_its_world_and_another_world_answers(host):
    first, second, other = *host.start(Clerk, ["rollout rank 2", "rollout rank 3"], "replica 1"), *host.start(Clerk, ["rollout rank 4"], "replica 2")
    board = Switchboard(host)
    lost = board.post([Call(first, "sleep", (60.0,)), Call(second, "die")], 60)
    works = board.post([Call(other, "sleep", (1.0,))], 60)
    assert board.wait([lost, works], 60) == [lost] or lost.over
    with pytest.raises(RankFailed, match="rollout rank 3") as failure:
        lost.collect()
    assert (failure.value.rank, failure.value.kind) == ("rollout rank 3", "died")
    assert [answer.kind for answer in lost.collect(settle=(RankFailed,))] == ["died", "died"]
    assert board.wait([works], 60) == [works] and works.collect() == [None]
    host.end(first)


def test_a_verb_that_nobody_waited_for_is_finished_and_its_answer_dropped(host):
    (rank,) = clerks(host, "a busy rank")
    board = Switchboard(host)
    board.post([Call(rank, "remember", (1,))], 60)
    assert board.ask([Call(rank, "remember", (2,))], 60) == [[1, 2]]


def test_threads_of_the_driver_ask_different_ranks_at_once(host):
    ranks = clerks(host, *(f"thread rank {number}" for number in range(3)))
    board = Switchboard(host)
    lengths = {}

    def ask(rank):
        lengths[rank.name] = [len(board.ask([Call(rank, "remember", (number,))], 60)[0]) for number in range(40)]

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {rank.name: list(range(1, 41)) for rank in ranks}
    assert board.watch.roles()["thread"] == RoleState(known=3, alive=3, working=0)


def test_a_world_that_is_started_anew_meets_somewhere_else(local_ranks):
    names, points = ["world rank 0", "world rank 1"], []
    for _ in range(2):
        ranks = local_ranks.start(Clerk, names, "a world")
        points.append(local_ranks.meeting_point("a world", ranks[0]))
        calls = [Call(rank, "world", (Place(number, 2, points[-1], LOOPBACK),)) for number, rank in enumerate(ranks)]
        assert Switchboard(local_ranks).ask(calls, 60) == [3.0, 3.0]
        os.kill(ranks[1].process[0].pid, signal.SIGKILL)
    assert points[0] != points[1]


def test_every_socket_of_the_cluster_is_on_the_loopback_address(ray_ranks):
    clerks(ray_ranks, "a rank with sockets")
    listening = [
        connection.laddr.ip
        for process in cluster_processes(ray_ranks.folder / "token")
        for connection in psutil.Process(process).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    assert {address.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


STRANGERS = {"without a token": (), "with another cluster's token": (("authorization", f"Bearer {secrets.token_hex(32)}"),)}


@pytest.mark.parametrize("metadata", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_on_this_machine_can_neither_ask_submit_nor_kill(ray_ranks, metadata):
    """Ray's own services, called as its clients call them but for the token: the list of nodes, a worker to run a task in, and the process of a rank itself."""
    import grpc
    import ray
    from ray.core.generated import core_worker_pb2, core_worker_pb2_grpc, gcs_service_pb2, gcs_service_pb2_grpc, node_manager_pb2, node_manager_pb2_grpc

    (rank,) = clerks(ray_ranks, f"a rank whom {len(metadata)} strangers call")
    pid = Switchboard(ray_ranks).ask([Call(rank, "pid")], 60)[0]
    (node,) = ray.nodes()
    ports = {connection.laddr.port for connection in psutil.Process(pid).net_connections("inet") if connection.status == psutil.CONN_LISTEN}
    gcs, raylet = ray.get_runtime_context().gcs_address, f"127.0.0.1:{node['NodeManagerPort']}"
    calls = [
        (gcs, lambda channel: gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetAllNodeInfo, gcs_service_pb2.GetAllNodeInfoRequest()),
        (gcs, lambda channel: gcs_service_pb2_grpc.ActorInfoGcsServiceStub(channel).RegisterActor, gcs_service_pb2.RegisterActorRequest()),
        (raylet, lambda channel: node_manager_pb2_grpc.NodeManagerServiceStub(channel).RequestWorkerLease, node_manager_pb2.RequestWorkerLeaseRequest()),
    ]
    for port in ports:
        for verb in ("PushTask", "KillActor"):
            request = getattr(core_worker_pb2, f"{verb}Request")()
            calls.append((f"127.0.0.1:{port}", lambda channel, verb=verb: getattr(core_worker_pb2_grpc.CoreWorkerServiceStub(channel), verb), request))
    assert ports
    for address, method, request in calls:
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refusal:
            method(channel)(request, timeout=5, metadata=metadata)
        assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED, (address, request)
    assert Switchboard(ray_ranks).ask([Call(rank, "pid")], 60) == [pid]
    with grpc.insecure_channel(gcs) as channel:  # the token alone makes the difference
        own = (("authorization", f"Bearer {(ray_ranks.folder / 'token').read_text()}"),)
        assert len(calls[0][1](channel)(calls[0][2], timeout=5, metadata=own).node_info_list) == 1


@pytest.mark.journey
def test_a_ray_client_with_a_wrong_token_does_not_get_in(ray_ranks, tmp_path):
    import ray

    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    script = f"import ray; ray.init(address={ray.get_runtime_context().gcs_address!r}); print(ray.get(ray.remote(lambda: 'got in').remote()))"
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    client = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, timeout=100, capture_output=True, text=True)
    assert client.returncode != 0 and "got in" not in client.stdout
    assert "uthentic" in client.stderr


def test_the_clusters_folder_and_token_are_private(ray_ranks):
    assert ray_ranks.folder.stat().st_mode & 0o777 == 0o700
    assert (ray_ranks.folder / "token").stat().st_mode & 0o777 == 0o600
    assert max(len(str(path)) for path in ray_ranks.folder.rglob("sockets/*")) < 107


BUSY_RUN = """
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
from megatron_ext.rl.hosts.ray_host import ray_host
from tests.support.clerk import Clerk

with ray_host({"all": 2}) as host:
    ranks = host.start(Clerk, ["a", "b"])
    board = Switchboard(host)
    board.ask([Call(rank, "remember", (1,)) for rank in ranks], 200)
    print(host.folder, flush=True)
    board.ask([Call(rank, "sleep", (60.0,)) for rank in ranks], 60)
"""


@contextmanager
def busy_run():
    """A driver of its own whose ranks are at work: (its process, the private folder of its cluster)."""
    root = Path(__file__).resolve().parents[2]
    driver = subprocess.Popen([sys.executable, "-c", BUSY_RUN], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, start_new_session=True)
    try:
        folder = Path(driver.stdout.readline().strip())
        assert len(cluster_processes(folder / "token")) >= 6
        yield driver, folder
    finally:
        driver.kill()


@pytest.mark.timeout(300)
@pytest.mark.journey
def test_ctrl_c_ends_a_busy_run_at_once_and_leaves_nothing_behind():
    """Ctrl-C reaches every process of the terminal's process group, so the signal is sent to the group."""
    with busy_run() as (driver, folder):
        os.killpg(driver.pid, signal.SIGINT)
        start = time.monotonic()
        assert driver.wait(timeout=30) != 0
        assert time.monotonic() - start < 25
        assert "KeyboardInterrupt" in driver.stderr.read()
        assert cluster_processes(folder / "token") == []
        assert not folder.exists()


LOCAL_RUN = """
from megatron_ext.rl.hosts.local_host import local_host
from megatron_ext.rl.hosts.switchboard import Call, Switchboard
from tests.support.clerk import Clerk

with local_host() as host:
    ranks = host.start(Clerk, ["a", "b"])
    board = Switchboard(host)
    print(*board.ask([Call(rank, "pid") for rank in ranks], 200), flush=True)
    board.ask([Call(rank, "compute", (60.0,)) for rank in ranks], 60)
"""


@pytest.mark.journey
def test_local_ranks_end_with_a_driver_that_is_killed_whether_they_compute_or_are_stopped():
    root = Path(__file__).resolve().parents[2]
    driver = subprocess.Popen([sys.executable, "-c", LOCAL_RUN], stdout=subprocess.PIPE, text=True, cwd=root)
    ranks = [psutil.Process(int(pid)) for pid in driver.stdout.readline().split()]
    ranks[0].suspend()
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(ranks, timeout=15)
    for rank in alive:
        rank.kill()
    assert len(ranks) == 2 and alive == []


@pytest.mark.journey
@pytest.mark.parametrize("victim", ["gcs_server", "raylet", "driver"])
def test_a_run_that_loses_rays_head_or_its_driver_ends_within_seconds_and_leaves_nothing_behind(victim):
    """Not even a rank that is stopped."""
    with busy_run() as (driver, folder):
        found = [psutil.Process(pid) for pid in cluster_processes(folder / "token")]
        next(process for process in found if process.cmdline()[0].startswith("ray::RankActor")).suspend()
        (driver if victim == "driver" else next(process for process in found if process.name() == victim)).kill()
        assert driver.wait(timeout=20) == (-signal.SIGKILL if victim == "driver" else 1)
        if victim != "driver":
            assert f"RankFailed: Ray's {victim} (pid" in driver.stderr.read()
        gone, alive = psutil.wait_procs(found, timeout=20)
        assert alive == [] and len(gone) == len(found)
        deadline = time.monotonic() + 10
        while folder.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not folder.exists()


@pytest.mark.journey
def test_a_failing_run_leaves_nothing_behind_and_restores_the_environment():
    before = dict(os.environ)
    script = (
        "import os; before = dict(os.environ)\n"
        "from megatron_ext.rl.hosts.ray_cluster import local_cluster\n"
        "from megatron_ext.rl.hosts.ray_processes import cluster_processes\n"
        "try:\n"
        "    with local_cluster(num_cpus=1) as folder:\n"
        "        assert len(cluster_processes(folder / 'token')) >= 4\n"
        "        raise ValueError('the run fails')\n"
        "except ValueError:\n"
        "    pass\n"
        "assert not folder.exists() and cluster_processes(folder / 'token') == []\n"
        "left = {name for name, _ in os.environ.items() ^ before.items()}\n"
        "assert left <= {'RAY_CLIENT_MODE', 'PYTHONBREAKPOINT'}, left\n"  # which Ray sets for its own use
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).resolve().parents[2], timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert dict(os.environ) == before
