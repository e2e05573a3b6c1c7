"""The post-mortem of a job: who failed first, and what it said last."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.cli.main import main
from megatron_ext.cli.task_record import TaskRecord


def task(logs: Path, rank: int, said: str, code: int | None) -> None:
    """A task of the job, as it leaves its log and its account."""
    (logs / f"rank-{rank:04d}.log").write_text(said)
    record = TaskRecord({"MEGATRON_EXT_TASKS": "ranks", "MEGATRON_EXT_LOGS": str(logs), "SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"node{rank}"})
    if code is not None:
        record.write(code)


def told(logs: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert main(["postmortem", str(logs), *options]) == 0
    out = capsys.readouterr().out
    assert (logs / "post-mortem.txt").read_text() == out
    return out.splitlines()


def test_the_first_to_fail_is_told_first_with_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task(tmp_path, 2, "one\ntwo\nValueError: the cause\n", 1)
    task(tmp_path, 0, "RuntimeError: peer lost\n", 1)
    task(tmp_path, 1, "all is well\n", 0)
    lines = told(tmp_path, capsys, "--lines", "2")
    assert lines[0] == "post-mortem: 2 of 3 tasks failed"
    assert lines[1].startswith("first: rank 2 on node2 ended with exit code 1 at ") and lines[2:4] == ["    two", "    ValueError: the cause"]
    assert lines[4].startswith("then: rank 0 on node0") and "all is well" not in "\n".join(lines)


def test_one_that_never_said_that_it_ended_is_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task(tmp_path, 0, "RuntimeError: peer lost\n", 1)
    task(tmp_path, 1, "", None)
    lines = told(tmp_path, capsys)
    assert lines[1] == "first: rank 1 on node1 never said that it ended: it was killed, or lost with its node; its last lines:"
    assert lines[2] == "    (it printed nothing)" and lines[3].startswith("then: rank 0")


def test_of_many_that_failed_the_rest_is_only_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(6):
        task(tmp_path, rank, f"said by {rank}\n", 1)
    lines = told(tmp_path, capsys)
    assert lines[-1] == "and rank 3, 4, 5" and "    said by 2" in lines and "    said by 3" not in lines


def test_a_task_that_could_not_even_begin_has_a_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank-0000.log").write_text("slurmstepd: error: execve(): python: No such file or directory\n")
    assert "rank 0 on ? never said that it ended" in told(tmp_path, capsys)[1]


def test_a_folder_without_logs_is_the_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["postmortem", str(tmp_path)]) == 2
    assert "holds no rank-*.log" in capsys.readouterr().err


def test_a_command_that_no_launcher_started_leaves_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGATRON_EXT_LOGS", str(tmp_path))
    assert main(["--version"]) == 0
    assert list(tmp_path.iterdir()) == []
