"""What a launcher says through the environment, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_ext.cli.execute import Executor
from megatron_ext.cli.launched import Launch, launched
from megatron_ext.cli.run_folder import RunFolder
from megatron_ext.cli.stages import STAGES
from megatron_ext.config.schema import RunConfig
from megatron_ext.errors import StoppedForRequeue, UserError
from megatron_ext.parallel.launch import LocalRanks


def task(logs: Path, number: int = 0, count: int = 2, tasks: str = "nodes") -> dict[str, str]:
    addresses = {"MEGATRON_EXT_ADDRESSES": "127.0.0.1 127.0.0.2", "MEGATRON_EXT_PORT": "1", "MEGATRON_EXT_LOGS": str(logs)}
    return {**addresses, "MEGATRON_EXT_TASKS": tasks, "SLURM_PROCID": str(number), "SLURM_NTASKS": str(count)}


def test_slurm_s_variables_alone_do_not_make_a_command_a_rank() -> None:
    """As in the shell of an allocation."""
    with launched({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}) as launch:
        assert launch is not None and isinstance(launch.ranks, LocalRanks) and launch.nodes is None and not launch.stop_asked


def test_half_a_launch_is_refused() -> None:
    with (
        pytest.raises(UserError, match="is set, but not MEGATRON_EXT_PORT, SLURM_PROCID, SLURM_NTASKS"),
        launched({"MEGATRON_EXT_TASKS": "ranks", "MEGATRON_EXT_ADDRESSES": "a", "MEGATRON_EXT_LOGS": "b"}),
    ):
        pass


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("token", "mode", "words"), [(None, 0, "holds no token"), ("", 0o600, "holds no token"), ("secret", 0o644, "mode 644")])
def test_a_ray_cluster_over_nodes_is_not_started_without_a_private_token(tmp_path: Path, number: int, token: str | None, mode: int, words: str) -> None:
    if token is not None:
        (tmp_path / "token").write_text(token)
        (tmp_path / "token").chmod(mode)
    with pytest.raises(UserError, match=words), launched(task(tmp_path, number)):
        pass


def test_a_single_node_needs_no_token_and_gets_no_cluster(tmp_path: Path) -> None:
    with launched(task(tmp_path, count=1)) as launch:
        assert launch is not None and launch.nodes is None and launch.stop_file == tmp_path / "STOP"


def test_a_stop_that_comes_between_stages_is_heeded_before_the_next(tmp_path: Path) -> None:
    executor = Executor(RunConfig(), RunFolder(tmp_path), False, Launch(stop_file=tmp_path / "STOP"))
    (tmp_path / "STOP").touch()
    with pytest.raises(StoppedForRequeue, match="stopped before tokenizer"):
        executor.execute(STAGES["tokenizer"])
    assert not (tmp_path / "tokenizer").exists()
