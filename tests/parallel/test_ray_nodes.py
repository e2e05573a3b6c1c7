"""A Ray cluster over several nodes, small and for real: two addresses of this machine are the nodes, a process serves the second."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext.parallel.store import free_port
from megatron_ext.rl.hosts.ray_node import open_desk

pytestmark = pytest.mark.journey
ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("127.0.1.1", "127.0.1.2")
SERVE = """
import sys
from pathlib import Path
from megatron_ext.rl.hosts.ray_node import serve_node
serve_node(tuple(sys.argv[1].split()), 1, int(sys.argv[2]), Path(sys.argv[3]))
"""


@dataclass(frozen=True)
class SecondNode:
    process: subprocess.Popen[str]
    port: int
    token: Path


@pytest.fixture
def second_node(tmp_path: Path) -> Iterator[SecondNode]:
    token, port = tmp_path / "token", free_port(ADDRESSES[0])
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    command = [sys.executable, "-c", SERVE, " ".join(ADDRESSES), str(port), str(token)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    yield SecondNode(process, port, token)
    process.kill()


def test_ranks_are_spread_over_nodes_meet_across_them_and_nobody_joins_without_the_token(second_node: SecondNode) -> None:
    command = [sys.executable, "-m", "tests.support.ray_driver", " ".join(ADDRESSES), str(second_node.port), str(second_node.token)]
    driver = subprocess.run([*command, str(second_node.process.pid)], cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert driver.returncode == 0, driver.stderr
    found = json.loads(driver.stdout.splitlines()[-1])
    first, second = found["addresses"][:2]
    assert {first, second} == set(ADDRESSES) and found["addresses"] == [first, second, first, second]
    assert found["meeting point"].startswith(f"tcp://{first}:") and found["sums"] == [10.0] * 4
    assert found["without the token"] == "UNAUTHENTICATED"
    assert found["a stopped rank there"] == [True, ADDRESSES[1]]  # it was ended from here, and its replacement got its place
    assert min(found["processes"]) >= 4 and found["left here"] == found["left there"] == []
    assert found["second node waits"]  # as long as the driver, whose later stages SLURM would end soon after the first task that has gone
    assert second_node.process.wait(timeout=20) == 0
    assert second_node.process.stdout.read().startswith(f"joining the Ray cluster at {ADDRESSES[0]}:")


def test_a_node_goes_home_when_the_driver_ends_without_ever_starting_ray(second_node: SecondNode) -> None:
    with open_desk(ADDRESSES[0], second_node.port, num_nodes=2):
        assert second_node.process.poll() is None
    assert second_node.process.wait(timeout=20) == 0 and second_node.process.stdout.read() == ""
