"""Ranks as processes of this machine: their results come back in order, the first failure is the one that is told, and nothing outlives the call."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ext.errors import CheckpointError, ConfigError, RankFailed, StoppedForRequeue
from megatron_ext.parallel.local import run_ranks
from tests.support import rank_functions as ranks

TIMEOUT_S = 60


def _alive(pid: int) -> bool:
    """Whether the process still runs; one that has ended and waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _eventually(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _pids(folder: Path, num_ranks: int) -> list[int]:
    """The ranks' process ids and those of the processes they started, once all have written them."""
    assert _eventually(lambda: all((folder / str(rank)).exists() and (folder / str(rank)).read_text() for rank in range(num_ranks)))
    return [int(pid) for rank in range(num_ranks) for pid in (folder / str(rank)).read_text().split()]


def test_results_come_back_by_value_in_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARKER", "seen by ranks")
    first, second = run_ranks(ranks.describe, 2, "argument", 7, timeout_s=TIMEOUT_S, threads_per_rank=2)
    assert (first["rank"], second["rank"]) == (0, 1)
    assert first["world_size"] == 2 and first["args"] == ("argument", 7)
    assert first["threads"] == 2
    assert second["marker"] == "seen by ranks"
    assert len({first["pid"], second["pid"], os.getpid()}) == 3


def test_a_result_larger_than_a_pipe_arrives_whole() -> None:
    tensors = run_ranks(ranks.big_tensor, 2, 1_000_000, timeout_s=TIMEOUT_S)
    assert [float(tensor.sum()) for tensor in tensors] == [0.0, 1_000_000.0]


def test_ranks_form_one_world_and_worlds_follow_each_other() -> None:
    assert run_ranks(ranks.summed_over_world, 2, timeout_s=TIMEOUT_S) == [3.0, 3.0]
    assert run_ranks(ranks.summed_over_world, 3, timeout_s=TIMEOUT_S) == [6.0, 6.0, 6.0]


@pytest.mark.parametrize(("kind", "words"), [("error", "ZeroDivisionError: one over nothing"), ("killed", "killed by SIGKILL")])
def test_the_rank_that_failed_first_is_named_and_not_the_peers_that_lost_it(kind: str, words: str) -> None:
    started = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 of 3") as failure:
        run_ranks(ranks.raise_on_rank_one, 3, kind, timeout_s=TIMEOUT_S)
    assert words in str(failure.value)
    assert time.monotonic() - started < TIMEOUT_S / 2, "the ranks that wait in a collective are ended"


def test_a_users_mistake_found_by_a_rank_is_raised_as_it_is() -> None:
    with pytest.raises(CheckpointError) as failure:
        run_ranks(ranks.raise_on_rank_one, 2, "user", timeout_s=TIMEOUT_S)
    assert str(failure.value) == "runs/x: is damaged; use another"
    with pytest.raises(ConfigError) as problems:
        run_ranks(ranks.raise_on_rank_one, 2, "config", timeout_s=TIMEOUT_S)
    assert str(problems.value) == "a.b: is wrong\nc.d: too"


def test_a_rank_that_exits_or_returns_what_cannot_travel_is_a_failure() -> None:
    with pytest.raises(RankFailed, match=r"rank 1 of 2: (.|\n)*SystemExit: 3"):
        run_ranks(ranks.exit_quietly, 2, timeout_s=TIMEOUT_S)
    with pytest.raises(RankFailed, match="rank 0 of 1: its result cannot be pickled"):
        run_ranks(ranks.returns_a_function, 1, timeout_s=TIMEOUT_S)


def test_ranks_that_take_too_long_are_named_and_ended_with_all_they_started(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="rank 1, 2 of 3 did not finish within 3 s"):
        run_ranks(ranks.sleep, 3, tmp_path, 60.0, timeout_s=3)
    assert not any(_alive(pid) for pid in _pids(tmp_path, 3))


def test_ctrl_c_ends_the_ranks(tmp_path: Path) -> None:
    def interrupt() -> None:
        _pids(tmp_path, 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_ranks(ranks.sleep, 2, tmp_path, 60.0, timeout_s=TIMEOUT_S)
    assert not any(_alive(pid) for pid in _pids(tmp_path, 2))


def test_what_a_watch_raises_ends_the_ranks(tmp_path: Path) -> None:
    def watch() -> None:
        if all((tmp_path / str(rank)).exists() for rank in range(2)):
            raise StoppedForRequeue("seen enough")

    with pytest.raises(StoppedForRequeue, match="seen enough"):
        run_ranks(ranks.sleep, 2, tmp_path, 60.0, timeout_s=TIMEOUT_S, watch=watch)
    assert not any(_alive(pid) for pid in _pids(tmp_path, 2))


def test_a_forwarded_signal_lets_every_rank_finish_before_the_stop_is_told(tmp_path: Path) -> None:
    def tell() -> None:
        _eventually(lambda: all((tmp_path / str(rank)).exists() for rank in range(2)))
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=tell).start()
    with pytest.raises(StoppedForRequeue):
        run_ranks(ranks.stop_when_told, 2, tmp_path, timeout_s=TIMEOUT_S, forward_signals=(signal.SIGUSR1,))
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["stopped", "stopped"]
    assert signal.getsignal(signal.SIGUSR1) is before


def test_ranks_end_when_the_process_that_started_them_dies(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from megatron_ext.parallel.local import run_ranks
from tests.support import rank_functions
run_ranks(rank_functions.sleep, 3, Path({str(tmp_path)!r}), 60.0, timeout_s=60)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path), "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        pids = _pids(tmp_path, 3)
    finally:
        parent.kill()
        parent.wait()
    assert _eventually(lambda: not any(_alive(pid) for pid in pids))


def test_a_function_of_the_main_script_is_refused() -> None:
    def local(rank: int, world_size: int, init_method: str) -> None: ...

    local.__module__ = "__main__"
    with pytest.raises(ValueError, match="move it to a module"):
        run_ranks(local, 1, timeout_s=TIMEOUT_S)
